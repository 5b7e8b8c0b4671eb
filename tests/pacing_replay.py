"""Replays recorded drafts through a pacing under given costs of passes: whole generations are judged in milliseconds.

`drafts.json` is written by benchmarks/record_drafts.py from SmolLM2 and the default drafter: per group and prompt, for every
token, the values of the drafted nodes in percent and the numbers of those that turned out right.  It verifies sixteen nodes at
every token, so that the drafter knows more there than it would in use.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from subquad.ir.draft import DraftTree
from subquad.runtime.pacing import Pacing

Step = tuple[Sequence[int], Sequence[int]]
"""Values in percent of the nodes below the pending token, the likeliest first, and which of them, from 1 on, came true."""
Costs = Callable[[int], float]
"""Seconds of a pass by the tokens fed."""

DRAFTING = 0.03
"""Seconds of drafting for a pass, where a pass of one token takes 1."""


def recorded() -> dict[str, list[list[Step]]]:
    """The recorded generations by group."""
    found: dict[str, list[list[Step]]] = json.loads(Path(__file__).with_name("drafts.json").read_text(encoding="utf-8"))
    return found


def table(known: dict[int, float]) -> Costs:
    """Costs between known ones by straight lines."""

    def of(width: int) -> float:
        below, above = max(w for w in known if w <= width), min(w for w in known if w >= width)
        share = 0.0 if above == below else (width - below) / (above - below)
        return known[below] + share * (known[above] - known[below])

    return of


def replay(
    pacing: Pacing, steps: Sequence[Step], costs: Costs, noise: float = 0.05, seed: int = 0
) -> tuple[float, int, int]:
    """(seconds, passes, tokens verified) of one generation; a plain one takes len(steps) * costs(1) seconds.

    noise: standard deviation of a pass's seconds, relative; one pass in a hundred takes twice as long besides.
    """
    source = random.Random(seed)
    seconds, passes, fed, place = 0.0, 0, 0, 0
    while place < len(steps):
        values, right = steps[place]
        allowed = min(pacing.allowance(1), len(steps) - place - 1)
        tree = star(values[: max(0, allowed)])
        (kept,) = pacing.cut([tree])
        assert kept is not None
        emitted = 1 + sum(node < len(kept) for node in right[: len(steps) - place - 1])
        taken = costs(len(kept)) * source.lognormvariate(0, noise) * (2 if source.random() < 0.01 else 1)
        taken += DRAFTING if allowed > 0 else 0
        pacing.record([kept], emitted, taken)
        seconds, passes, fed, place = seconds + taken, passes + 1, fed + len(kept), place + emitted
    return seconds, passes, fed


def gain(pacing: Pacing, generations: Iterable[Sequence[Step]], costs: Costs, seed: int = 0) -> float:
    """Plain seconds over the seconds of generations one after the other under one pacing."""
    whole = list(generations)
    taken = sum(replay(pacing, steps, costs, seed=seed + n)[0] for n, steps in enumerate(whole))
    return sum(map(len, whole)) * costs(1) / taken


def star(percents: Sequence[int]) -> DraftTree:
    """A tree whose nodes hang below the root: a pacing reads their number and their values only."""
    count = 1 + len(percents)
    return DraftTree(tuple(range(count)), (-1,) + (0,) * len(percents), (1.0, *(p / 100 for p in percents)))
