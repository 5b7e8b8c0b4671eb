"""Run a randomised procedure on every outcome of its draws, each with its probability: proof by exhaustion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable

from torch import Tensor


class Outcomes:
    """A Chance that replays given outcomes and opens new branches behind them, depth first."""

    def __init__(self) -> None:
        self.path: list[tuple[int, list[tuple[int, float]]]] = []
        self.place = 0

    def happens(self, probability: float) -> bool:
        branches = [(1, probability), (0, 1 - probability)]
        return bool(self._next([b for b in branches if b[1] > 0]))

    def pick(self, weights: Tensor) -> int:
        assert weights.shape[0] == 1
        total = float(weights.sum())
        return self._next([(n, float(w) / total) for n, w in enumerate(weights[0]) if w > 0])

    def _next(self, branches: list[tuple[int, float]]) -> int:
        if self.place == len(self.path):
            self.path.append((0, branches))
        chosen, known = self.path[self.place]
        self.place += 1
        return known[chosen][0]

    def probability(self) -> float:
        product = 1.0
        for chosen, branches in self.path[: self.place]:
            product *= branches[chosen][1]
        return product

    def advance(self) -> bool:
        """Move to the next combination; False when there is none."""
        self.place = 0
        while self.path:
            chosen, branches = self.path.pop()
            if chosen + 1 < len(branches):
                self.path.append((chosen + 1, branches))
                return True
        return False


def law_of(run: Callable[[Outcomes], Hashable]) -> dict[Hashable, float]:
    """The exact distribution of what `run` returns."""
    chance, law = Outcomes(), defaultdict(float)
    while True:
        result = run(chance)
        law[result] += chance.probability()
        if not chance.advance():
            return dict(law)


def variation(one: dict[Hashable, float], other: dict[Hashable, float]) -> float:
    """Total variation distance of two distributions."""
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys()) / 2
