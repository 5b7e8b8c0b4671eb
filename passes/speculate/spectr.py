"""Several independent drafts of a draft model, merged into one tree (SpecTr, Sun et al. 2310.15141)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, OpenStepper
from subquad.passes.speculate.k_sequential import KSequential
from subquad.passes.speculate.sampled_trees import DrawnTree, Level, TreeDrafting


@dataclass(frozen=True)
class SpecTr:
    """`drafts` sequences of `length` tokens, drawn independently (paper: 8 of 4 or 8 tokens).

    A draft counts with its multiplicity: a node remembers every draw of its children.  Under greedy decoding all drafts are
    the argmax chain.  open: a fresh stepper of the draft model, which must verify trees.  vocabulary: size of the target's
    logits.
    """

    open: OpenStepper
    vocabulary: int
    drafts: int = 3
    length: int = 4
    acceptance: AcceptanceRule = field(default_factory=KSequential)

    def start(self, tokens: Sequence[int], choice: Choice) -> TreeDrafting:
        """The draft model reads the prompt."""
        return TreeDrafting.begin(self.open, tokens, choice, self.vocabulary, partial(self._plan, choice))

    def _plan(self, choice: Choice, rows: int, depth: int) -> Sequence[Level]:
        """As many drafts as fit without looking at them: leaving out one for what it is would bias the law."""
        length = min(depth, self.length, rows)
        ends = [0] * min(self.drafts, rows // length) if length > 0 else []
        return [partial(self._level, choice, ends)] * length if ends else []

    @staticmethod
    def _level(choice: Choice, ends: list[int], tree: DrawnTree, depth: int, law: Callable[[int], Tensor]) -> None:
        for n, node in enumerate(ends):
            known = law(node)
            token = int(known.argmax()) if choice.greedy else choice.chance.pick(known[None])
            ends[n] = tree.child(node, token)
