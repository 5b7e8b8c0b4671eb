"""What a conversion is asked to do, as frozen data: token budget, sizes, learning rates, loss weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from subquad.ir.errors import ConversionError

LEAST = {"length": 2, "transfer_rows": 1, "transfer_updates": 1, "rank": 1, "rows": 1, "held_out": 0, "seed": 0}


@dataclass(frozen=True)
class Settings:
    """How `convert` spends its tokens.

    tokens: counted over both stages.  length: tokens of one training row.  transfer_share: part of the tokens that
    attention transfer processes, in batches of `transfer_rows`, each used for `transfer_updates` optimiser steps at
    `transfer_rate`.  The rest trains adapters of rank `rank` (strength alpha / rank) at `adapter_rate`, and the added
    parameters further at `added_rate`, in batches of `rows`, on cross_entropy · CE(next token) + distillation ·
    KL(original ‖ converted).  held_out: tokens after the training text on which perplexity and KL are measured.
    seed: of the adapters' initial values.  compile: True, False, or None to compile when the budget repays it.
    Raises ConversionError for a value out of range, or for a budget below one batch of each stage.
    """

    tokens: int
    length: int = 512
    transfer_share: float = 0.2
    transfer_rows: int = 4
    transfer_updates: int = 8
    transfer_rate: float = 3e-2
    rank: int = 8
    alpha: int = 16
    rows: int = 2
    adapter_rate: float = 3e-3
    added_rate: float = 5e-3
    cross_entropy: float = 0.5
    distillation: float = 0.5
    held_out: int = 8192
    seed: int = 0
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConversionError(f"{name} is {value!r}; it must be an integer of at least {least}.")
        if not 0 <= self.transfer_share <= 1:
            raise ConversionError(f"transfer_share is {self.transfer_share!r}; it must lie between 0 and 1.")
        if self.cross_entropy < 0 or self.distillation < 0 or self.cross_entropy + self.distillation == 0:
            raise ConversionError("cross_entropy and distillation must not be negative, nor both zero.")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < self.least:
            raise ConversionError(
                f"tokens is {self.tokens!r}; training needs at least {self.least}: one batch of each stage, "
                f"at length {self.length}."
            )

    @property
    def least(self) -> int:
        """The smallest budget: one batch of every stage that is asked for."""
        transfer = self.transfer_rows if self.transfer_share > 0 else 0
        return self.length * (transfer + (self.rows if self.adapts else 0))

    @property
    def adapts(self) -> bool:
        """True when a second stage follows attention transfer."""
        return self.transfer_share < 1

    @property
    def transfer_batches(self) -> int:
        """Batches of attention transfer: at least one when it has any share."""
        size = self.transfer_rows * self.length
        if not self.adapts:
            return self.tokens // size
        return 0 if self.transfer_share == 0 else max(1, int(self.tokens * self.transfer_share) // size)

    @property
    def adapter_batches(self) -> int:
        """Batches of the second stage: what the budget leaves."""
        left = self.tokens - self.transfer_batches * self.transfer_rows * self.length
        return left // (self.rows * self.length) if self.adapts else 0

    @property
    def used_tokens(self) -> int:
        """Tokens that are processed: the budget rounded down to whole batches."""
        return self.length * (self.transfer_batches * self.transfer_rows + self.adapter_batches * self.rows)

    def json(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)

    def digest(self, *more: str) -> str:
        """A hash of the settings and of what else decides the result; `compile` only changes speed and stays out."""
        data = {key: value for key, value in self.json().items() if key != "compile"}
        text = json.dumps([data, *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
