"""Drafts by a smaller model with another tokenizer: its text is encoded again (universal assisted generation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from subquad.ir.decoding import AcceptanceRule, Choice, OpenStepper, RollbackStepper, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.sample_and_descend import SampleAndDescend

OVERLAP = 16
"""Committed tokens that are encoded again in front of the draft, so that it is split as the model would split it."""


class Codec(Protocol):
    """A tokenizer without special tokens."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


@dataclass(frozen=True)
class OtherTokenizer:
    """What a draft model continues the text with, at most `tokens` of its argmax tokens, in the model's own ids.

    open: a fresh stepper of the draft model.  own, other: the tokenizers of model and draft model.  vocabulary: size of the
    model's logits.  The draft is a function of the text, so that it is exact for sampling too, whatever it says.
    """

    open: OpenStepper
    own: Codec
    other: Codec
    vocabulary: int
    tokens: int = 5
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)

    def start(self, tokens: Sequence[int], choice: Choice) -> _Translated:
        """The draft model reads the text at its first draft."""
        return _Translated(self, list(tokens))


@dataclass
class _Translated:
    drafter: OtherTokenizer
    tokens: list[int]
    _stepper: RollbackStepper | None = None
    _fed: list[int] = field(default_factory=list)

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The chain of the draft model's text; the root alone where it reads nothing, or its text does not go on from ours."""
        knobs, most = self.drafter, min(rows, depth)
        read = knobs.other.encode(knobs.own.decode(self.tokens))
        if most <= 0 or len(read) < 2:
            return DraftTree.chain((self.tokens[-1],))
        written = self._written(read, min(most, knobs.tokens))
        before, after = knobs.other.decode(read), knobs.other.decode([*read, *written])
        if not after.startswith(before):
            return DraftTree.chain((self.tokens[-1],))
        drafted = self._own_ids(after[len(before) :])[:most]
        known = next((n for n, token in enumerate(drafted) if not 0 <= token < knobs.vocabulary), len(drafted))
        return DraftTree.chain((self.tokens[-1], *drafted[:known]))

    def observe(self, result: Verified) -> None:
        """Take in what was committed; the draft model reads it with its next draft."""
        self.tokens += result.tokens

    def _written(self, read: list[int], count: int) -> list[int]:
        """Argmax tokens of the draft model behind its reading, which it keeps as far as it has not changed."""
        common = 0
        while common < min(len(self._fed), len(read) - 1) and self._fed[common] == read[common]:
            common += 1
        if self._stepper is None or common == 0:
            self._stepper = self.drafter.open()
            self._stepper.prefill(torch.tensor([read[:-1]]), None)
            common = len(read) - 1
        elif common < len(self._fed):
            self._stepper.rollback([len(self._fed) - common])
        feed = read[common:]
        found: list[int] = []
        self._fed = read[:common]
        while len(found) < count:
            logits = self._stepper.verify([DraftTree.chain(tuple(feed))])[0][-1]
            self._stepper.commit([range(len(feed))])
            self._fed += feed
            feed = [int(logits.argmax())]
            found += feed
        return found

    def _own_ids(self, text: str) -> list[int]:
        own, tail = self.drafter.own, self.tokens[-OVERLAP:]
        whole = own.encode(own.decode(tail) + text)
        return whole[len(tail) :] if whole[: len(tail)] == tail else own.encode(text)
