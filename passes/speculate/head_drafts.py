"""Draft with trained heads: a tree of their likeliest guesses behind the last accepted token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.likeliest_tree import Guess, grow
from subquad.passes.speculate.sample_and_descend import SampleAndDescend


class Heads(Protocol):
    """What guesses: for `levels` tokens behind the pending one, among the tokens `ids`."""

    levels: int
    ids: Tensor

    def guesses(self, hidden: Tensor, pending: int) -> Guess:
        """The scores of one sequence; hidden: [1, d]."""


@dataclass(frozen=True, eq=False)
class HeadDrafter:
    """Trees from trained heads, from the second pass on: the first one shows what the model's head of logits read.

    branch: children of a node that are looked at.  least: see `grow`.
    """

    heads: Heads
    branch: int = 4
    least: float = 0.04
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)

    def start(self, tokens: Sequence[int], choice: Choice) -> _Guessing:
        """A sequence; nothing outlives it."""
        return _Guessing(self, tokens[-1])


@dataclass
class _Guessing:
    drafter: HeadDrafter
    last: int
    _hidden: Tensor | None = None

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The most probable nodes by the heads."""
        if self._hidden is None or rows <= 0:
            return DraftTree((self.last,), (-1,))
        one, heads = self.drafter, self.drafter.heads
        with torch.inference_mode():
            guess = heads.guesses(self._hidden, self.last)
            return grow(self.last, guess, heads.ids, rows, min(depth, heads.levels), one.branch, one.least)

    def observe(self, result: Verified) -> None:
        """Keep what was read behind the last accepted node; the token behind that one is pending now."""
        self._hidden = None if result.hidden is None else result.hidden(result.path[-1:])
        self.last = result.tokens[-1]
