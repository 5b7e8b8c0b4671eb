"""Drafts by the model itself with some of its blocks left out, which ones being searched while it decodes (SWIFT, 2410.06916)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from subquad.ir.decoding import AcceptanceRule, Choice, OwnModel, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.sample_and_descend import SampleAndDescend

WINDOW = 32
"""Drafted tokens by which a set of blocks is judged (the paper's context window)."""
ENOUGH = 0.95
"""Accepted share of drafted tokens at which the search ends (paper)."""
FAILURES = 300
"""Sets in a row that were no better, after which it ends too (paper)."""


@dataclass
class Search:
    """The best set of left-out blocks so far, and the one on trial.

    The paper scores a set by running it over the last tokens; here its drafts are what is scored, so that the search costs no
    pass of its own.  Every second trial swaps one block of the best set, the others are drawn anew.
    """

    share: float
    best: frozenset[int] = frozenset()
    score: float = -1.0
    trial: frozenset[int] = frozenset()
    _blocks: int = 0
    _trials: int = 0
    _failures: int = 0
    _drafted: int = 0
    _accepted: int = 0
    _source: random.Random = field(default_factory=lambda: random.Random(0))

    def skipped(self, blocks: int) -> frozenset[int]:
        """The blocks to leave out now; the first and the last one never are.  Begins with every second one."""
        if blocks != self._blocks:
            self._blocks, self.score, self._trials, self._failures = blocks, -1.0, 0, 0
            inner = list(range(1, blocks - 1))
            spread = [*inner[::2], *inner[1::2]]
            self.best = self.trial = frozenset(spread[: int(self.share * len(inner))])
        return self.trial

    def note(self, drafted: int, accepted: int) -> None:
        """What became of one draft of the set on trial."""
        if self.score >= ENOUGH or self._failures >= FAILURES or not self.best:
            return
        self._drafted, self._accepted = self._drafted + drafted, self._accepted + accepted
        if self._drafted < WINDOW:
            return
        score = self._accepted / self._drafted
        self._failures = 0 if score > self.score else self._failures + 1
        if score > self.score:
            self.best, self.score = self.trial, score
        self._drafted = self._accepted = 0
        ended = self.score >= ENOUGH or self._failures >= FAILURES
        self.trial = self.best if ended else self._next()

    def _next(self) -> frozenset[int]:
        self._trials += 1
        inner = range(1, self._blocks - 1)
        if self._trials % 2 == 0:
            return frozenset(self._source.sample(inner, len(self.best)))
        others = sorted(set(inner) - self.best)
        if not others:
            return self.best
        return self.best - {self._source.choice(sorted(self.best))} | {self._source.choice(others)}


@dataclass(frozen=True)
class LayerSkip:
    """A chain of at most `tokens` argmax tokens of the model without a `share` of its inner blocks.

    The draft reads the keys and values of the model itself and leaves none: verification writes over its own.  A chain ends
    behind a token less likely than `confidence`.  The paper's values are share 0.45, confidence 0.8 and 25 tokens.
    """

    share: float = 0.45
    tokens: int = 6
    confidence: float = 0.8
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)
    search: Search = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "search", Search(self.share))

    def start(self, tokens: Sequence[int], choice: Choice) -> _Skipping:
        """A sequence; the search goes on through all of them."""
        return _Skipping(self, tokens[-1])


@dataclass
class _Skipping:
    drafter: LayerSkip
    last: int
    _own: OwnModel | None = None
    _drafted: int = 0

    def attach(self, own: OwnModel) -> None:
        """Draft with this model."""
        self._own = own

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The chain; each token runs the whole chain again, which costs what one token does as long as it is short."""
        knobs, chain = self.drafter, [self.last]
        skipped = knobs.search.skipped(0 if self._own is None else self._own.blocks)
        while self._own is not None and len(chain) <= min(rows, depth, knobs.tokens):
            law = self._own.skipping(chain, skipped)[-1].float().softmax(-1)
            chain.append(int(law.argmax()))
            if float(law[chain[-1]]) < knobs.confidence:
                break
        self._drafted = len(chain) - 1
        return DraftTree.chain(tuple(chain))

    def observe(self, result: Verified) -> None:
        """Score the blocks that were left out."""
        if self._drafted:
            self.drafter.search.note(self._drafted, len(result.path) - 1)
        self._drafted, self.last = 0, result.tokens[-1]
