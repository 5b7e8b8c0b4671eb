"""R2: standard speculative sampling of one drawn chain (Leviathan et al. 2211.17192, Chen et al. 2302.01318)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subquad.ir.decoding import Chance
from subquad.ir.draft import DraftTree


@dataclass(frozen=True)
class SpeculativeSampling:
    """Accept x ~ q with probability min(1, p(x) / q(x)), otherwise draw from norm((p − q)+) (Leviathan et al., theorem 1)."""

    def emit(self, scores: Tensor, tree: DraftTree, node: int, chance: Chance) -> int:
        """The drafted child's token or a draw from the residual; without a child a draw from softmax(scores [1, V])."""
        target = scores.double().softmax(-1)
        drawn, law = tree.drawn(node), tree.law(node)
        if not drawn or law is None:
            return chance.pick(target)
        draft = law.double().reshape(1, -1)
        token = tree.tokens[drawn[0]]
        if chance.happens(ratio(target, draft, token)):
            return token
        return chance.pick(residual(target, draft))


def ratio(target: Tensor, draft: Tensor, token: int) -> float:
    """min(1, p(x) / q(x)) of laws [1, V]; 0 where the draft could not have drawn x."""
    below = float(draft[0, token])
    return min(1.0, float(target[0, token]) / below) if below > 0 else 0.0


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """norm((p − q)+) of laws [1, V]; p itself where rounding leaves nothing, that is, where p and q are equal."""
    left = (target - draft).clamp_min(0)
    total = left.sum()
    return left / total if total > 0 else target
