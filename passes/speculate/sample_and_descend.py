"""R1: draw from the target's own law, then descend where the draft has that token; exact for any tree fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subquad.ir.decoding import Chance
from subquad.ir.draft import DraftTree


@dataclass(frozen=True)
class SampleAndDescend:
    """One draw per emitted token, in order, from the same row as without a draft: the random stream is that of plain sampling.

    The token is drawn before the children are looked at, so that its law is the target's for every tree.
    """

    def emit(self, scores: Tensor, tree: DraftTree, node: int, chance: Chance) -> int:
        """A token drawn from softmax(scores [1, V])."""
        return chance.pick(scores.softmax(-1))
