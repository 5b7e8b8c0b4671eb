"""Drafts that repeat what followed the last n tokens earlier (prompt lookup, Saxena 2023; LLMA, Yang et al. 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.rates import Rates
from subquad.passes.speculate.sample_and_descend import SampleAndDescend


def _prior(key: Any) -> float:
    """The rate after a match of n tokens before anything was counted."""
    return min(0.8, 0.25 + 0.15 * key)


@dataclass(frozen=True)
class PromptLookup:
    """Up to `tokens` tokens behind the most recent earlier occurrence of the last n, n from `longest` down to `shortest`.

    Hugging Face's words are prompt_lookup_num_tokens (tokens) and max_matching_ngram_size (longest); vLLM's
    prompt_lookup_max and prompt_lookup_min.  The prompt and what was generated are both looked up.
    """

    tokens: int = 10
    longest: int = 3
    shortest: int = 1
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)
    rates: Rates = field(default_factory=lambda: Rates(_prior))

    def start(self, tokens: Sequence[int], choice: Choice) -> _Lookup:
        """The index of a sequence: for every n-gram the place behind its last occurrence."""
        return _Lookup(self, tokens)


class _Lookup:
    def __init__(self, drafter: PromptLookup, tokens: Sequence[int]) -> None:
        self.drafter = drafter
        self.tokens: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}
        self._matched, self._place = 0, 0
        self._proposed: tuple[int, ...] = ()
        for token in tokens:
            self._add(token)

    def _add(self, token: int) -> None:
        """Find the match of the new suffix, then index that suffix itself."""
        self.tokens.append(token)
        self._matched = 0
        for n in range(self.drafter.longest, self.drafter.shortest - 1, -1):
            if n > len(self.tokens):
                continue
            gram = tuple(self.tokens[-n:])
            if not self._matched and gram in self.places:
                self._matched, self._place = n, self.places[gram]
            self.places[gram] = len(self.tokens)

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The chain behind the match."""
        count = min(rows, depth, self.drafter.tokens) if self._matched else 0
        self._proposed = tuple(self.tokens[self._place : self._place + count])
        values = [1.0]
        for n in range(len(self._proposed)):
            values.append(values[-1] * self.drafter.rates.rate(min(self._matched + n, 8)))
        return DraftTree.chain((self.tokens[-1], *self._proposed), tuple(values))

    def observe(self, result: Verified) -> None:
        """Count how far the draft was right and index the committed tokens."""
        for n, (drafted, token) in enumerate(zip(self._proposed, result.tokens, strict=False)):
            self.drafter.rates.add(min(self._matched + n, 8), drafted == token)
            if drafted != token:
                break
        self._proposed = ()
        for token in result.tokens:
            self._add(token)
