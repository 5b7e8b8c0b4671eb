"""Drafts that repeat what followed the longest earlier occurrence of the present suffix (SAM decoding, Hu et al. 2411.10666)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.rates import Rates
from subquad.passes.speculate.sample_and_descend import SampleAndDescend


class SuffixAutomaton:
    """The suffix automaton of a growing sequence, with the longest suffix that also ends earlier (Blumer et al. 1985).

    At most two states a token; adding a token costs O(1) amortised.  `matched` is the length of that suffix, and
    `continuation` gives the place behind its last known earlier occurrence.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.end = [-1], [0], [-1]
        self.last = self.state = self.matched = self.continuation = 0

    def add(self, token: int) -> None:
        """Advance the match over what came before, then extend the automaton."""
        following, link, length = self.next, self.link, self.length
        state = self.state
        while state and token not in following[state]:
            state = link[state]
            self.matched = length[state]
        found = following[state].get(token)
        self.tokens.append(token)
        self._extend(token)
        if found is None:
            self.state = self.matched = self.continuation = 0
            return
        self.matched += 1
        if length[link[found]] >= self.matched:  # `found` was cloned: the match now is in the clone
            found = link[found]
        self.state = found
        self.continuation = self.end[found] + 1
        self.end[found] = len(self.tokens) - 1

    def _extend(self, token: int) -> None:
        following, link, length = self.next, self.link, self.length
        new = self._state({}, length[self.last] + 1, len(self.tokens) - 1)
        place = self.last
        self.last = new
        while place != -1 and token not in following[place]:
            following[place][token] = new
            place = link[place]
        if place == -1:
            link[new] = 0
            return
        reached = following[place][token]
        if length[place] + 1 == length[reached]:
            link[new] = reached
            return
        clone = self._state(dict(following[reached]), length[place] + 1, self.end[reached])
        link[clone] = link[reached]
        while place != -1 and following[place].get(token) == reached:
            following[place][token] = clone
            place = link[place]
        link[reached] = link[new] = clone

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self.next.append(following)
        self.link.append(0)
        self.length.append(length)
        self.end.append(end)
        return len(self.next) - 1


def _prior(key: Any) -> float:
    """The rate of a match of a length class before anything was counted."""
    return min(0.9, 0.2 + 0.1 * key)


def length_class(matched: int) -> int:
    """1, 2, 3, 4, then one class for 5–6, 7–10, 11–18, more."""
    if matched < 5:
        return matched
    return 5 if matched < 7 else 6 if matched < 11 else 7 if matched < 19 else 8


@dataclass(frozen=True)
class SuffixMatch:
    """Drafts min(most, base + slope · matched) tokens after a match of at least `least` tokens.

    The paper's values are most 40, base 1, slope 4; short drafts suit a CPU, where a row has its price.
    """

    most: int = 16
    base: int = 2
    slope: float = 2.0
    least: int = 1
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)
    rates: Rates = field(default_factory=lambda: Rates(_prior))

    def start(self, tokens: Sequence[int], choice: Choice) -> _SuffixDrafting:
        """The automaton of a sequence."""
        return _SuffixDrafting(self, tokens)


class _SuffixDrafting:
    def __init__(self, drafter: SuffixMatch, tokens: Sequence[int]) -> None:
        self.drafter, self.automaton = drafter, SuffixAutomaton()
        self._proposed: tuple[int, ...] = ()
        self._matched = 0
        for token in tokens:
            self.automaton.add(token)

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The chain after the earlier occurrence, with the rates of its match, which grows with every token."""
        found, knobs = self.automaton, self.drafter
        begin, self._matched = found.continuation, found.matched
        count = min(rows, depth, knobs.most, int(knobs.base + knobs.slope * found.matched))
        if found.matched < knobs.least:
            count = 0
        self._proposed = tuple(found.tokens[begin : begin + count])
        values = [1.0]
        for n in range(len(self._proposed)):
            values.append(values[-1] * knobs.rates.rate(length_class(found.matched + n)))
        return DraftTree.chain((found.tokens[-1], *self._proposed), tuple(values))

    def observe(self, result: Verified) -> None:
        """Count how far the draft was right and take the committed tokens in."""
        for n, (drafted, token) in enumerate(zip(self._proposed, result.tokens, strict=False)):
            self.drafter.rates.add(length_class(self._matched + n), drafted == token)
            if drafted != token:
                break
        self._proposed = ()
        for token in result.tokens:
            self.automaton.add(token)
