"""R0: the largest score decides, and the draft only says whether its row is already there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subquad.ir.decoding import Chance
from subquad.ir.draft import DraftTree
from subquad.kernels.largest import first_largest


@dataclass(frozen=True)
class Greedy:
    """Every token is the argmax after the true prefix, by induction over the walk; the drafter does not matter."""

    def emit(self, scores: Tensor, tree: DraftTree, node: int, chance: Chance) -> int:
        """The first of the largest scores [1, V]."""
        best = first_largest(scores)
        return int(scores.argmax(-1)) if best is None else best
