"""Decoders whose layers keep tables of their positions in plain attributes, in the spellings in use."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from written.case import Case, hidden

HEADS, SIZE, WIDTH = 4, 8, 32


def _angles(time: int, rates: Tensor) -> Tensor:
    """[time, SIZE]."""
    angles = torch.outer(torch.arange(time, device=rates.device).type_as(rates), rates)
    return torch.cat([angles, angles], -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class OfThisLength(nn.Module):
    """The tables are those of the last length; another length makes them anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", 100.0 ** -torch.linspace(0, 1, SIZE // 2), persistent=False)
        self.length: int | None = None
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[-2]
        if time != self.length or self.cos is None or self.cos.device != x.device:
            self.length = time
            angles = _angles(time, self.rates)
            self.cos, self.sin = angles.cos()[None], angles.sin()[None]
        return _turned(x, self.cos, self.sin)


class OfTheLongest(OfThisLength):
    """The tables are those of the longest sequence so far, of which a shorter one reads the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[-2]
        if time > self.length:
            self.length = time
            angles = _angles(time, self.rates)
            self.cos, self.sin = angles.cos(), angles.sin()
        return _turned(x, self.cos[:time], self.sin[:time])


class Unnamed(OfThisLength):
    """The attribute appears with the first call, and its own length tells whether it reaches."""

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[-2]
        if not hasattr(self, "angles") or self.angles.shape[0] < time:
            self.angles = _angles(time, self.rates)
        return _turned(x, self.angles[:time].cos(), self.angles[:time].sin())


class Registered(OfThisLength):
    """A buffer that is registered anew for a longer sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[-2]
        if self.angles is None or self.angles.shape[0] < time:
            self.register_buffer("angles", _angles(time, self.rates), persistent=False)
        return _turned(x, self.angles[:time].cos(), self.angles[:time].sin())


class ForEach(OfThisLength):
    """A dictionary with a table for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[-2]
        if time not in self.tables:
            self.tables[time] = _angles(time, self.rates)
        return _turned(x, self.tables[time].cos(), self.tables[time].sin())


class Cached(OfThisLength):
    """A method that Python caches."""

    @lru_cache(maxsize=4)  # noqa: B019
    def angles(self, time: int) -> Tensor:
        return _angles(time, self.rates)

    def forward(self, x: Tensor) -> Tensor:
        angles = self.angles(x.shape[-2])
        return _turned(x, angles.cos(), angles.sin())


class Beside:
    """Tables of an object that is no module."""

    def __init__(self) -> None:
        self.length, self.bias = -1, None

    def __call__(self, time: int) -> Tensor:
        if time != self.length:
            places = torch.arange(time)
            self.length, self.bias = time, (places - places[:, None]).abs().neg() * 0.1
        return self.bias


class TableDecoder(nn.Module):
    """Two layers that share nothing; turn: rotates queries and keys, before: a call that went before the capture."""

    def __init__(self, turn: type[OfThisLength] | None, before: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.turns = nn.ModuleList([turn() for _ in range(2)]) if turn else [nn.Identity()] * 2
        self.bias = None if turn else Beside()
        if before:
            self.eval()(torch.zeros(1, before, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for project, turn in zip(self.layers, self.turns, strict=True):
            q, k, v = project(x).unflatten(-1, (3, HEADS, SIZE)).movedim(1, 3).unbind(1)
            scores = turn(q) @ turn(k).mT * SIZE**-0.5
            if self.bias is not None:
                scores = scores + self.bias(x.shape[1])
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x


TWO = ({"mask": "full"},) * 2
ANY = ("export", "verified", "dynamo")
"""torch.export by itself refuses to see a plain attribute assigned, so that there is no program to decompose."""
CASES = [
    Case("tables of this length", lambda: TableDecoder(OfThisLength), hidden(), TWO, dialects=ANY),
    Case("tables of an earlier call", lambda: TableDecoder(OfThisLength, 9), hidden(), TWO, dialects=ANY),
    Case("tables of the longest", lambda: TableDecoder(OfTheLongest), hidden(), TWO, dialects=ANY),
    Case("tables of the longest, filled", lambda: TableDecoder(OfTheLongest, 6), hidden(), TWO, dialects=ANY),
    Case("tables that appear", lambda: TableDecoder(Unnamed), hidden(), TWO, dialects=ANY),
    Case("tables that have appeared", lambda: TableDecoder(Unnamed, 5), hidden(), TWO, dialects=ANY),
    Case("a buffer for the longest", lambda: TableDecoder(Registered), hidden(), TWO, dialects=ANY),
    Case("a table for each length", lambda: TableDecoder(ForEach), hidden(), TWO, dialects=ANY),
    Case("a table that Python caches", lambda: TableDecoder(Cached), hidden(), TWO, dialects=ANY),
    Case("a table beside the modules", lambda: TableDecoder(None), hidden(), ({},) * 2, dialects=ANY),
]  # fmt: skip
