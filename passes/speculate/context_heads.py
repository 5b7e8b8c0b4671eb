"""Drafters that keep a context: what the model's head read behind all committed tokens, the prompt's too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.frequent_words import FrequentWords
from subquad.passes.speculate.likeliest_tree import Guess, grow
from subquad.passes.speculate.sample_and_descend import SampleAndDescend

REACH = 256
"""Committed tokens that a context holds, the newest ones; training sees no longer texts."""


class Context(Protocol):
    """The committed part of one sequence; drafted tokens leave nothing in it."""

    def add(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Tokens that were committed, and what the model's head read behind each of them, [n, d]."""

    def guesses(self, pending: int) -> Guess | None:
        """The scores behind the pending token, which follows on what was added; None while too little was."""


class ContextHeads(FrequentWords):
    """Heads that read a context."""

    @abstractmethod
    def opened(self) -> Context:
        """The context of a new sequence, empty."""

    def drafter(self) -> ContextDrafter:
        """Trees of the likeliest guesses."""
        return ContextDrafter(self)


@dataclass(frozen=True, eq=False)
class ContextDrafter:
    """Trees from heads that read a context; a sequence has one of its own.

    branch: children of a node that are looked at.  least: see `likeliest_tree.grow`.
    """

    heads: ContextHeads
    branch: int = 4
    least: float = 0.04
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)

    def start(self, tokens: Sequence[int], choice: Choice) -> _Reading:
        """A sequence; nothing outlives it."""
        return _Reading(self, list(tokens[:-1]), tokens[-1], self.heads.opened())


@dataclass
class _Reading:
    drafter: ContextDrafter
    prompt: list[int]
    last: int
    context: Context

    def read(self, hidden: Tensor) -> None:
        """Begin with the end of the prompt."""
        with torch.inference_mode():
            self.context.add(self.prompt[-REACH:], hidden[-REACH:])

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The most probable nodes by the heads."""
        one, heads = self.drafter, self.drafter.heads
        with torch.inference_mode():
            guess = self.context.guesses(self.last) if rows > 0 else None
            if guess is None:
                return DraftTree((self.last,), (-1,))
            return grow(self.last, guess, heads.ids, rows, min(depth, heads.levels), one.branch, one.least)

    def observe(self, result: Verified) -> None:
        """What was committed and read joins the context; the token behind it is pending now."""
        if result.hidden is not None:
            with torch.inference_mode():
                self.context.add([result.tree.tokens[n] for n in result.path], result.hidden(result.path))
        self.last = result.tokens[-1]
