"""How many drafted tokens are worth verifying now: expected gain against the cost of a pass, with rests where drafting loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from subquad.ir.draft import DraftTree
from subquad.ir.probes import counts_behind
from subquad.runtime.pass_costs import PassCosts

MOST = 16
"""Tokens that a pass may feed in all rows together."""
MARGIN = 1.03
"""A draft must promise, and speculation must keep, this much more than plain decoding; drafting itself costs about as much."""
LOSS, LEAST_LOSS = 3.0, 0.5
"""Passes of one token that speculation may lose in all before drafting rests; what was won before is not counted against it.
After a rest without success since it may lose half as much as before that, down to the least."""
IDLE = 8
"""Passes in a row without a draft that was worth its cost, after which drafting rests."""
SOON, SELDOM = 2, 64
"""Wide passes in a row after which one is plain, so that their costs can be compared: first, and at last."""
DOUBT = 0.04
"""How far one pass moves the trust in the drafter's values."""
REST, LONGEST = 16, 256
"""Tokens of the first rest; each that follows without success lasts twice as long, up to the longest."""


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
    """Weighs what the drafter expects of each node against the measured cost of a wider pass.

    most: tokens that a pass may feed.  trust: accepted nodes per node that the values promised.  One object serves a decoder
    for all of its calls.  When nothing is worth verifying, or what was verified did not pay, drafting rests; rests grow until
    a draft pays again.
    """

    most: int = MOST
    costs: PassCosts = field(default_factory=PassCosts)
    trust: float = 1.0
    _lost: float = 0.0
    _idle: int = 0
    _rest: int = 0
    _wide: int = 0
    _most_wide: int = SOON
    _pause: int = REST

    def begin(self) -> None:
        """A new call: another text may draft better than the last, so that no rest goes on; of its doubts half do."""
        self._lost = LOSS / 2 if self._rest > 0 or self._pause > REST else 0.0
        self._rest, self._idle, self._pause = 0, 0, REST

    def allowance(self, rows: int) -> int:
        """Nodes that each of `rows` live rows may draft now; 0 while drafting rests, and for a plain pass now and then."""
        return 0 if self._rest > 0 or self._wide >= self._most_wide else max(0, self.most // rows - 1)

    def cut(self, trees: Sequence[DraftTree | None]) -> list[DraftTree | None]:
        """The trees with the nodes that pay; trees without values and drawn ones stay whole."""
        live = [tree for tree in trees if tree is not None]
        if self._rest > 0 or any(tree.laws or (not tree.values and len(tree) > 1) for tree in live):
            return list(trees)
        nodes = [(value, n, fed) for n, t in enumerate(trees) if t is not None for value, fed in _falling(t)]
        nodes.sort(key=lambda node: (-node[0], node[1]))
        roots = sum(counts_behind(tree.probes, len(tree))[0] for tree in live)
        kept = [0] * len(trees)
        for _, n, _ in nodes[: self._best(len(live), roots, [(value, fed) for value, _, fed in nodes])]:
            kept[n] += 1
        return [None if tree is None else tree.first(1 + kept[n]) for n, tree in enumerate(trees)]

    def _best(self, rows: int, probes: int, nodes: list[tuple[float, int]]) -> int:
        """How many of the nodes, the likeliest first, give the most tokens for the cost of their pass.

        probes: what runs beside the roots.  nodes: the value of each, and the rows that it brings, its probes included.
        """
        fed, gain = rows + probes, float(rows)
        best, speed = 0, MARGIN * gain / self.costs.of(fed)
        for n, (value, more) in enumerate(nodes, 1):
            fed, gain = fed + more, gain + self.trust * value
            if fed > self.most:
                break
            rate = gain / self.costs.of(fed)
            if rate > speed:
                best, speed = n, rate
        return best

    def record(self, trees: Sequence[DraftTree | None], emitted: int, seconds: float) -> None:
        """One pass: what was fed, the tokens it gave in all rows, and its seconds, drafting included."""
        live = [tree for tree in trees if tree is not None]
        fed, rows = sum(tree.rows for tree in live), len(live)
        self.costs.learn(fed, seconds)
        if self._wide >= self._most_wide:
            self._most_wide = min(SELDOM, 2 * self._most_wide)
        self._wide = self._wide + 1 if fed > rows else 0
        if self._rest > 0:
            self._rest -= emitted
            return
        self._believe(live, emitted - rows)
        self._idle = 0 if fed > rows else self._idle + 1
        if fed > rows:
            self._lost += MARGIN * self.costs.of(fed) / self.costs.of(rows) - emitted / rows
            if self._lost < 0:
                self._lost, self._pause = 0.0, REST
        if self._idle >= IDLE or self._lost > max(LEAST_LOSS, LOSS * REST / self._pause):
            self._pause_drafting()

    def _believe(self, live: list[DraftTree], accepted: int) -> None:
        expected = sum(value for tree in live for value in tree.values[1:])
        if expected > 0:
            share = min(4.0, accepted / expected)
            self.trust = min(1.5, max(0.2, self.trust + DOUBT * min(1.0, expected) * (share - self.trust)))

    def _pause_drafting(self) -> None:
        """Rest, and begin afterwards with half of the doubts."""
        self._rest, self._pause = self._pause, min(LONGEST, 2 * self._pause)
        self._lost, self._idle = 0.0, 0
        self.trust = (1 + self.trust) / 2


def _falling(tree: DraftTree) -> list[tuple[float, int]]:
    """The values of the nodes below the root, none larger than one before it, and the rows that each brings."""
    least, found = 1.0, []
    for value, probes in zip(tree.values[1:], counts_behind(tree.probes, len(tree))[1:], strict=False):
        least = min(least, value)
        found.append((least, 1 + probes))
    return found
