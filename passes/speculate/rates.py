"""How often a drafted token turned out to be the next one, by where it stood in the draft."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

MEMORY = 400
"""Trials after which older ones count half, so that the rates follow the text."""


@dataclass
class Rates:
    """Counts of hits and trials per key, with `prior(key)` weighing as much as `weight` trials.

    A function of committed tokens alone: a trial is a drafted token whose place was reached by what was committed.
    """

    prior: Callable[[Any], float]
    weight: float = 8.0
    counts: dict[Hashable, list[float]] = field(default_factory=dict)

    def rate(self, key: Hashable) -> float:
        """The estimated probability, given that the parent was accepted."""
        hits, trials = self.counts.get(key, (0.0, 0.0))
        return (hits + self.weight * self.prior(key)) / (trials + self.weight)

    def add(self, key: Hashable, hit: bool) -> None:
        """One trial."""
        kept = self.counts.setdefault(key, [0.0, 0.0])
        kept[0] += hit
        kept[1] += 1
        if kept[1] > MEMORY:
            kept[0] /= 2
            kept[1] /= 2
