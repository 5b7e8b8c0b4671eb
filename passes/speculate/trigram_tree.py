"""Drafts from a table of trigrams that the committed tokens reinforce (ADED, Liu et al. 2407.12021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.ranked_tree import grow, learn, prior
from subquad.passes.speculate.rates import Rates
from subquad.passes.speculate.sample_and_descend import SampleAndDescend

Table = dict[tuple[int, int], dict[int, float]]


@dataclass(frozen=True)
class TrigramTree:
    """(t1, t2) → weights of t3; a tree over it, best first.

    step, most: what a committed trigram adds to its weight, and the largest weight (paper: 0.04 and 3).  window: last tokens
    whose trigrams are reinforced before every draft (paper: 16).  continuations: kept per pair (paper: 12).  depth: paper 4.
    The paper searches the tree by Monte Carlo under a reward that the prior dominates; the best paths are taken directly.
    """

    step: float = 0.04
    most: float = 3.0
    window: int = 16
    continuations: int = 12
    depth: int = 4
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)
    rates: Rates = field(default_factory=lambda: Rates(prior))
    table: Table = field(default_factory=dict)

    def read(self, tokens: Iterable[int]) -> None:
        """Fill the table with the relative frequencies of a corpus's trigrams, the likeliest continuations of each pair."""
        counts: dict[tuple[int, int], dict[int, int]] = {}
        ids = list(tokens)
        for first, second, third in zip(ids, islice(ids, 1, None), islice(ids, 2, None), strict=False):
            following = counts.setdefault((first, second), {})
            following[third] = following.get(third, 0) + 1
        for pair, following in counts.items():
            total = sum(following.values())
            best = sorted(following.items(), key=lambda item: (-item[1], item[0]))[: self.continuations]
            self.table[pair] = {token: count / total for token, count in best}

    def reinforce(self, tokens: Sequence[int]) -> None:
        """Raise the weight of every trigram in the last tokens."""
        for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
            following = self.table.setdefault((first, second), {})
            following[third] = min(self.most, following.get(third, 0.0) + self.step)
            if len(following) > self.continuations:
                del following[min(following, key=lambda token: (following[token], token != third))]

    def ranked(self, pair: tuple[int, ...]) -> list[int]:
        """Continuations of two tokens, the heaviest first."""
        following = self.table.get((pair[0], pair[1]), {})
        return sorted(following, key=following.__getitem__, reverse=True)

    def start(self, tokens: Sequence[int], choice: Choice) -> _Trigrams:
        """A sequence, whose prompt is read like what is generated."""
        self.reinforce(tokens)
        return _Trigrams(self, list(tokens[-self.window :]))


@dataclass
class _Trigrams:
    drafter: TrigramTree
    recent: list[int]
    _proposed: DraftTree | None = None

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The best tree of continuations of the last two tokens."""
        one = self.drafter
        if len(self.recent) < 2:
            return DraftTree((self.recent[-1],), (-1,), (1.0,))
        self._proposed = grow(tuple(self.recent[-2:]), one.ranked, one.rates, rows, min(depth, one.depth))
        return self._proposed

    def observe(self, result: Verified) -> None:
        """Reinforce the trigrams of the window that now ends with the committed tokens."""
        if self._proposed is not None:
            learn(self._proposed, result.tokens, self.drafter.rates)
            self._proposed = None
        self.recent = [*self.recent, *result.tokens][-self.drafter.window :]
        self.drafter.reinforce(self.recent)
