"""What a pass of several tokens costs in passes of one, learnt from passes that follow each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTHS = (1, 2, 4, 8, 16)
"""Tokens fed at which the cost is known; between them it is interpolated."""
EXPECTED = (1.0, 1.1, 1.15, 1.25, 1.9)
"""Costs before anything was measured, low on purpose: a width that is tried shows what it costs, one that is not never does."""
STEP, LEAST = 0.4, 0.03
"""How far the first pair of passes moves the costs, and how far any later one still does."""
SOON = 5
"""Pairs after which a pair moves them half as far."""
JUMP = 0.7
"""The largest difference of logarithms that a pair counts with: a pass that the machine interrupted says little."""


@dataclass
class PassCosts:
    """Relative costs of passes by the tokens fed.

    Two passes in a row run in the same context and beside the same other work, so that their ratio says how their widths
    compare, while seconds alone would not.  Only ratios of costs mean something.  pairs: how many were compared so far; the
    more, the less one moves the costs.
    """

    logarithms: list[float] = field(default_factory=lambda: [math.log(cost) for cost in EXPECTED])
    pairs: int = 0
    _last: tuple[int, float] | None = None

    @staticmethod
    def measured(seconds: Sequence[float]) -> PassCosts:
        """From the seconds of passes of WIDTHS."""
        return PassCosts([math.log(one / seconds[0]) for one in seconds])

    def of(self, width: int) -> float:
        """The cost of a pass of `width` tokens."""
        return math.exp(sum(self.logarithms[n] * share for n, share in _shares(width)))

    def learn(self, width: int, seconds: float) -> None:
        """One pass; it is compared with the one before."""
        last, self._last = self._last, (width, seconds)
        if last is None or last[0] == width:
            return
        error = math.log(seconds / last[1]) - math.log(self.of(width) / self.of(last[0]))
        move = max(LEAST, STEP / (1 + self.pairs / SOON)) * max(-JUMP, min(JUMP, error))
        self.pairs += 1
        for at, sign in ((width, 1.0), (last[0], -1.0)):
            for n, share in _shares(at):
                self.logarithms[n] += sign * move * share
        least = self.logarithms[0]
        self.logarithms = [value - least for value in self.logarithms]


def _shares(width: int) -> tuple[tuple[int, float], ...]:
    """The widths between which a width lies, by their place in WIDTHS, and how much of each it is."""
    if width >= WIDTHS[-1]:
        return ((len(WIDTHS) - 1, 1.0),)
    above = next(n for n, known in enumerate(WIDTHS) if known >= width)
    if WIDTHS[above] == width:
        return ((above, 1.0),)
    share = (width - WIDTHS[above - 1]) / (WIDTHS[above] - WIDTHS[above - 1])
    return ((above - 1, 1 - share), (above, share))
