"""How many drafted tokens are worth verifying now: measured cost of a pass against expected gain, with rests and probes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from subquad.ir.draft import DraftTree

MOST = 16
"""Tokens that a pass may feed: the widest for which a decoder is compiled."""
MARGIN = 1.02
"""Speculation must be faster than plain decoding by this factor to go on."""
WINDOW = 32
"""Tokens over which the two are compared."""
REST = 64
"""Tokens decoded plainly after speculation lost, before it is probed again."""
PROBE = 4
"""Passes of one probe."""
REFRESH = 128
"""Passes after which one is plain."""
KEPT = 9
"""Measurements of a width whose median is its cost."""
LEARN = (1, 2, 4, 8, 16)
"""Widths that are measured as soon as there are drafts to fill them."""
SLOPE = 0.08
"""Assumed growth of a pass per token beyond the widest that was measured."""


@dataclass
class Costs:
    """Measured seconds of a pass by the tokens fed; widths between are interpolated."""

    seen: dict[int, deque[float]] = field(default_factory=dict)
    medians: dict[int, float] = field(default_factory=dict)

    def add(self, width: int, seconds: float) -> None:
        """One measurement."""
        kept = self.seen.setdefault(width, deque(maxlen=KEPT))
        kept.append(seconds)
        self.medians[width] = median(kept)

    def of(self, width: int) -> float | None:
        """Seconds of a pass of a width; None while nothing was measured."""
        known = self.medians
        if width in known or not known:
            return known.get(width)
        below = max((w for w in known if w < width), default=None)
        above = min((w for w in known if w > width), default=None)
        if below is None:
            return known[above]  # type: ignore[index]
        if above is None:
            return known[below] * (1 + SLOPE * (width - below))
        share = (width - below) / (above - below)
        return known[below] + share * (known[above] - known[below])


class Pacing(Protocol):
    """Decides from the past alone how much of what is drafted gets verified, so that acceptance stays exact."""

    def allowance(self, rows: int) -> int:
        """Nodes that each of `rows` live rows may draft now; 0 is plain decoding."""

    def cut(self, trees: Sequence[DraftTree | None]) -> list[DraftTree | None]:
        """What to verify of the drafted trees."""

    def record(self, trees: Sequence[DraftTree | None], emitted: int, seconds: float) -> None:
        """One pass: what was fed, the tokens it gave in all rows, and its seconds, drafting included."""


@dataclass(frozen=True)
class FixedPacing:
    """Verifies all that is drafted, up to `nodes` below the pending token of each row."""

    nodes: int

    def allowance(self, rows: int) -> int:
        """Always `nodes`."""
        return self.nodes

    def cut(self, trees: Sequence[DraftTree | None]) -> list[DraftTree | None]:
        """The trees as they are."""
        return list(trees)

    def record(self, trees: Sequence[DraftTree | None], emitted: int, seconds: float) -> None:
        """Nothing is learnt."""


@dataclass
class MeasuredPacing:
    """Weighs gain against measured cost.  One object serves a decoder for all of its calls.

    most: tokens that a pass may feed.  Trees with estimated values are cut where the next node no longer pays; when
    speculation as a whole is slower than plain decoding, it rests and is probed again.  A plain pass now and then keeps
    its cost known.
    """

    most: int = MOST
    costs: Costs = field(default_factory=Costs)
    trust: float = 1.0
    _spent: float = 0.0
    _won: float = 0.0
    _rest: int = 0
    _probe: int = 0
    _passes: int = 0

    def allowance(self, rows: int) -> int:
        """Nodes that each of `rows` live rows may draft now; 0 while speculation rests."""
        if self._rest > 0 or len(self.costs.seen.get(rows, ())) < 2 or self._passes % REFRESH == 0:
            return 0
        return max(0, self.most // rows - 1)

    def cut(self, trees: Sequence[DraftTree | None]) -> list[DraftTree | None]:
        """The trees with the nodes that pay; trees without values and drawn ones stay whole."""
        live = [tree for tree in trees if tree is not None]
        if self._rest > 0 or any(tree.laws or (not tree.values and len(tree) > 1) for tree in live):
            return list(trees)
        nodes = sorted((-value, n) for n, tree in enumerate(trees) if tree is not None for value in _falling(tree))
        count = self._best(len(live), [-value for value, _ in nodes])
        kept = [0] * len(trees)
        for _, n in nodes[:count]:
            kept[n] += 1
        return [None if tree is None else tree.first(1 + kept[n]) for n, tree in enumerate(trees)]

    def _best(self, rows: int, values: list[float]) -> int:
        for width in LEARN:
            if rows < width <= min(rows + len(values), self.most) and len(self.costs.seen.get(width, ())) < 2:
                return width - rows
        best, speed, gain = 0, rows / (self.costs.of(rows) or 1.0), float(rows)
        for n, value in enumerate(values, 1):
            gain += self.trust * value
            rate = gain / (self.costs.of(rows + n) or 1.0)
            if rate > speed * (MARGIN if best == 0 else 1.0):
                best, speed = n, rate
        if best == 0 and self._probe > 0 and values:
            return min(len(values), 3)
        return best

    def record(self, trees: Sequence[DraftTree | None], emitted: int, seconds: float) -> None:
        """One pass: what was fed, the tokens it gave in all rows, and its seconds, drafting included."""
        live = [tree for tree in trees if tree is not None]
        fed, rows = sum(map(len, live)), len(live)
        self.costs.add(fed, seconds)
        self._passes += 1
        if self._rest > 0:
            self._rest -= emitted
            if self._rest <= 0:
                self._probe, self._spent, self._won = PROBE, 0.0, 0.0
            return
        plain = self.costs.of(rows)
        expected = sum(value for tree in live for value in tree.values[1:])
        if expected > 0:
            share = min(2.0, (emitted - rows) / expected)
            weight = min(0.1, 0.1 * expected)
            self.trust = min(1.5, max(0.2, self.trust + weight * (share - self.trust)))
        if self._probe > 0:
            self._probe -= 1
        if plain is None or fed == rows:
            return
        keep = 1 - emitted / (WINDOW + emitted)
        self._spent = keep * self._spent + seconds
        self._won = keep * self._won + emitted / rows * plain
        if self._probe == 0 and self._won < MARGIN * self._spent and self._won > WINDOW / 2 * plain:
            self._rest = REST


def _falling(tree: DraftTree) -> list[float]:
    """The values of the nodes below the root, none larger than one before it."""
    least, found = 1.0, []
    for value in tree.values[1:]:
        least = min(least, value)
        found.append(least)
    return found
