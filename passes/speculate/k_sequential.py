"""R4: K-SEQ selection among independent drafts (SpecTr, Sun et al. 2310.15141, algorithm 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ir.decoding import Chance
from subquad.ir.draft import DraftTree

HALVINGS = 60
"""Steps of the bisection for ρ: an interval of [1, k] becomes as narrow as double precision tells apart."""


@dataclass(frozen=True)
class KSequential:
    """Accept draw i of k independent ones with probability min(1, p(x) / (ρ q(x))), in order; otherwise draw the residual.

    With β(ρ) = Σ min(q, p / ρ) a draw is accepted with probability β, any of k with a = 1 − (1 − β)^k, and what is accepted
    has the law min(q, p / ρ) / β whatever its place.  The residual (p − min(q, p / ρ) · a / β) / (1 − a) is a law as long as
    a ≤ ρ β; the smallest such ρ is used.
    """

    def emit(self, scores: Tensor, tree: DraftTree, node: int, chance: Chance) -> int:
        """The first accepted draw's token, otherwise a draw from the residual of softmax(scores [1, V])."""
        target = scores.double().softmax(-1)
        drawn, law = tree.drawn(node), tree.law(node)
        if not drawn or law is None:
            return chance.pick(target)
        draft = law.double().reshape(1, -1)
        factor = division_factor(target, draft, len(drawn))
        for child in drawn:
            token = tree.tokens[child]
            below = factor * float(draft[0, token])
            if below > 0 and chance.happens(min(1.0, float(target[0, token]) / below)):
                return token
        return chance.pick(_residual(target, draft, factor, len(drawn)))


def division_factor(target: Tensor, draft: Tensor, count: int) -> float:
    """The smallest ρ in [1, k] with 1 − (1 − β(ρ))^k ≤ ρ β(ρ), from above; ρ = k always is one, by the union bound."""
    low, high = 1.0, float(count)
    if _fits(target, draft, low, count):
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(target, draft, middle, count) else (middle, high)
    return high


def _overlap(target: Tensor, draft: Tensor, factor: float) -> float:
    return float(torch.minimum(draft, target / factor).sum())


def _fits(target: Tensor, draft: Tensor, factor: float, count: int) -> bool:
    beta = _overlap(target, draft, factor)
    return 1 - (1 - beta) ** count <= factor * beta


def _residual(target: Tensor, draft: Tensor, factor: float, count: int) -> Tensor:
    beta = _overlap(target, draft, factor)
    if beta <= 0:
        return target
    accepted = 1 - (1 - beta) ** count
    left = (target - torch.minimum(draft, target / factor) * (accepted / beta)).clamp_min(0)
    total = left.sum()
    return left / total if total > 0 else target
