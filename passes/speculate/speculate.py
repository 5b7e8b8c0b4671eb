"""`speculate`: a decoding loop drafts several tokens and verifies them in one pass; what it decodes stays the same.

    one token a pass   →   one token a pass, and as many more as were drafted right

The default drafter unites a suffix automaton over the sequence with Token Recycling; both need no weights and no training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from subquad.ir.contract import Contract
from subquad.ir.decoding import Drafter
from subquad.ir.loop_rewrite import LoopRewrite
from subquad.passes.speculate.layer_skip import LayerSkip
from subquad.passes.speculate.prompt_lookup import PromptLookup
from subquad.passes.speculate.suffix_automaton import SuffixMatch
from subquad.passes.speculate.token_recycling import TokenRecycling
from subquad.passes.speculate.trigram_tree import TrigramTree
from subquad.passes.speculate.union import Union


@dataclass(frozen=True)
class Speculate(LoopRewrite):
    """Draft and verify under exact rules of acceptance.

    method: "auto" (suffix automaton and Token Recycling), "suffix", "ngram" (prompt lookup), "recycling", "trigram" or
    "layer_skip" (the model itself without some of its blocks).
    num_speculative_tokens: most tokens drafted for a pass; how many of them are verified follows from measured costs.
    prompt_lookup_max, prompt_lookup_min: longest and shortest n-gram that "ngram" looks up.
    """

    name: ClassVar[str] = "speculate"
    contract: ClassVar[Contract] = Contract.LOSSLESS
    matches: ClassVar[str] = "the decoding loop of a model that generates"
    paper: ClassVar[str] = "arXiv:2411.10666, arXiv:2408.08696"

    method: str = "auto"
    num_speculative_tokens: int = 15
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the method {self.method!r} is unknown; known: {', '.join(sorted(METHODS))}.")
        if self.num_speculative_tokens < 1:
            raise ValueError(f"num_speculative_tokens is {self.num_speculative_tokens}; it must be at least 1.")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max {self.prompt_lookup_max}; "
                "the first must be at least 1 and at most the second."
            )

    def drafter(self) -> Drafter:
        """A drafter that has learnt nothing yet."""
        return METHODS[self.method](self)


METHODS: dict[str, Callable[[Speculate], Drafter]] = {
    "auto": lambda knobs: Union((SuffixMatch(), TokenRecycling())),
    "suffix": lambda knobs: SuffixMatch(most=knobs.num_speculative_tokens),
    "ngram": lambda knobs: PromptLookup(knobs.num_speculative_tokens, knobs.prompt_lookup_max, knobs.prompt_lookup_min),
    "recycling": lambda knobs: TokenRecycling(),
    "trigram": lambda knobs: TrigramTree(),
    "layer_skip": lambda knobs: LayerSkip(tokens=min(LayerSkip.tokens, knobs.num_speculative_tokens)),
}
