"""`speculate`: a decoding loop drafts several tokens and verifies them in one pass; what it decodes stays the same.

    one token a pass   →   one token a pass, and as many more as were drafted right

The default drafter unites a suffix automaton over the sequence with Token Recycling; both need no weights and no training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

from torch import Tensor

from subquad.ir.contract import Contract
from subquad.ir.decoding import Drafter
from subquad.ir.errors import GenerationError
from subquad.ir.loop_rewrite import LoopRewrite
from subquad.ir.trained import NOTHING, Trained
from subquad.passes.speculate.chimera import Chimera
from subquad.passes.speculate.draft_heads import DraftHeads
from subquad.passes.speculate.falcon import Falcon
from subquad.passes.speculate.head_drafts import HeadDrafter
from subquad.passes.speculate.hydra import Hydra
from subquad.passes.speculate.kangaroo import Kangaroo
from subquad.passes.speculate.layer_skip import LayerSkip
from subquad.passes.speculate.medusa import Medusa
from subquad.passes.speculate.online_distillation import OnlineDistillation
from subquad.passes.speculate.prompt_lookup import PromptLookup
from subquad.passes.speculate.prompt_tokens import MASKS, PromptTokens
from subquad.passes.speculate.s2d import S2D
from subquad.passes.speculate.suffix_automaton import SuffixMatch
from subquad.passes.speculate.token_recycling import TokenRecycling
from subquad.passes.speculate.trigram_tree import TrigramTree
from subquad.passes.speculate.union import Union


@dataclass(frozen=True)
class Speculate(LoopRewrite):
    """Draft and verify under exact rules of acceptance.

    method: "auto" (suffix automaton, Token Recycling, and what was trained for the model), "suffix", "ngram" (prompt lookup),
    "recycling", "trigram", "layer_skip" (the model itself without some of its blocks), or what `convert` trains: "medusa",
    "hydra", "chimera", "falcon", "ppd" (prompt tokens), "s2d" (copies of the model's first blocks) or "kangaroo" (the
    blocks themselves and an adapter).
    num_speculative_tokens: most tokens drafted for a pass; how many of them are verified follows from measured costs.
    prompt_lookup_max, prompt_lookup_min: longest and shortest n-gram that "ngram" looks up.
    draft_block: tokens that "falcon" guesses in one of its passes (paper: 2 to 4).
    prompt_copies, prompt_mask: of every prompt token of "ppd", how many whose guesses are averaged, and what each sees of the
    others: "ensemble", "decoder" or "encoder"; see prompt_tokens.MASKS.  These three are settled when the drafter is trained.
    online_update_interval: rejected guesses after which trained heads learn from them (OSD, 2310.07177); 0: they stay.
    early_exit: blocks behind which the drafter that `convert` trains leaves the model; 0: the paper's.
    confidence: a chain that the model drafts itself ends behind a token less likely than this, and an exit of "s2d" leaves such
    a token to the next exit; None: the papers'.
    """

    name: ClassVar[str] = "speculate"
    contract: ClassVar[Contract] = Contract.LOSSLESS
    matches: ClassVar[str] = "the decoding loop of a model that generates"
    paper: ClassVar[str] = "arXiv:2411.10666, arXiv:2408.08696"

    method: str = "auto"
    num_speculative_tokens: int = 15
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 1
    online_update_interval: int = 0
    draft_block: int = 2
    prompt_copies: int = 1
    prompt_mask: str = "ensemble"
    early_exit: int = 0
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.method not in KNOWN:
            raise ValueError(f"the method {self.method!r} is unknown; known: {', '.join(KNOWN)}.")
        if self.num_speculative_tokens < 1:
            raise ValueError(f"num_speculative_tokens is {self.num_speculative_tokens}; it must be at least 1.")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max {self.prompt_lookup_max}; "
                "the first must be at least 1 and at most the second."
            )
        for word in ("draft_block", "prompt_copies"):
            if not 1 <= getattr(self, word) <= 4:
                raise ValueError(f"{word} is {getattr(self, word)}; it must be 1 to 4.")
        if self.prompt_mask not in MASKS:
            raise ValueError(f"the prompt_mask {self.prompt_mask!r} is unknown; known: {', '.join(MASKS)}.")
        if self.online_update_interval < 0:
            raise ValueError(f"online_update_interval is {self.online_update_interval}; it must be 0 or more.")
        if self.early_exit < 0:
            raise ValueError(f"early_exit is {self.early_exit}; it must be 0 or more.")
        if self.confidence is not None and self.method not in SURE:
            raise ValueError(f"{self.method!r} has no confidence; {', '.join(SURE)} have.")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence is {self.confidence}; it must lie between 0 and 1.")

    @property
    def trains(self) -> str | None:
        """The method, when it drafts with parameters that are trained."""
        return self.method if self.method in TRAINED else None

    def drafter(self, trained: Trained = NOTHING) -> Drafter:
        """A drafter that has learnt nothing yet beyond what was trained."""
        if self.method in TRAINED:
            made = trained_drafter(self.method, trained, self.online_update_interval)
        else:
            made = METHODS[self.method](self, trained)
        return made if self.confidence is None else replace(made, confidence=self.confidence)  # type: ignore[type-var]


class TrainedPart(Protocol):
    """What `convert` trains for a drafter; see rewriter/training for how."""

    name: ClassVar[str]

    @classmethod
    def restored(cls, parameters: Mapping[str, Tensor], head: Tensor) -> Self:
        """From stored parameters, beside the model's head of logits [V, d]; raises GenerationError for any others."""

    def parameters_by_name(self) -> dict[str, Tensor]:
        """What `restored` reads."""

    def drafter(self) -> Drafter:
        """What drafts with it."""


HEADS: dict[str, type[DraftHeads]] = {kind.name: kind for kind in (Medusa, Hydra)}
"""Heads that read the last hidden state and the tokens behind it, by the word for them."""
TRAINED: dict[str, type[TrainedPart]] = {
    **HEADS,
    **{kind.name: kind for kind in (Chimera, Falcon, PromptTokens, Kangaroo, S2D)},
}
"""All that `convert` trains, by the word for it."""


def trained_drafter(name: str, trained: Trained, interval: int = 0) -> Drafter:
    """Drafts by what was trained, which goes on learning when an interval is given.

    Raises GenerationError when there is nothing for this model, or when it cannot go on learning.
    """
    made = TRAINED[name].restored(*trained.of(name)).drafter()
    if not interval:
        return made
    if name not in HEADS:
        raise GenerationError(f"a {name} drafter does not learn while it is used; give online_update_interval 0.")
    assert isinstance(made, HeadDrafter)
    return OnlineDistillation(made, interval)


def _default(knobs: Speculate, trained: Trained) -> Drafter:
    interval = knobs.online_update_interval
    parts = [trained_drafter(n, trained, interval * (n in HEADS)) for n in TRAINED if n in trained.parameters]
    return Union((SuffixMatch(), TokenRecycling(), *parts))


METHODS: dict[str, Callable[[Speculate, Trained], Drafter]] = {
    "auto": _default,
    "suffix": lambda knobs, _: SuffixMatch(most=knobs.num_speculative_tokens),
    "ngram": lambda knobs, _: PromptLookup(
        knobs.num_speculative_tokens, knobs.prompt_lookup_max, knobs.prompt_lookup_min
    ),
    "recycling": lambda knobs, _: TokenRecycling(),
    "trigram": lambda knobs, _: TrigramTree(),
    "layer_skip": lambda knobs, _: LayerSkip(tokens=min(LayerSkip.tokens, knobs.num_speculative_tokens)),
}
"""Ways to draft that need no training."""
SURE = ("layer_skip", "kangaroo", "s2d")
"""Those that draft by how sure they are."""
KNOWN = tuple(sorted((*METHODS, *TRAINED)))
