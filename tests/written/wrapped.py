"""Attention inside other constructs of torch and Python: calls of every form, shared layers, casts, containers."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from written.case import Case, hidden

WIDTH, HEADS, SIZE = 32, 4, 8
SCALE = SIZE**-0.5
Tensor = torch.Tensor
HEADED = {"heads": HEADS, "head_dim": SIZE, "scale": SCALE}


class Attend(nn.Module):
    """Self- or cross-attention of [.., T, width] with any number of axes in front."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.kv, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None, *, hidden_keys: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if memory is None else memory).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, SIZE)).transpose(-3, -2) for y in (self.q(x), k, v))
        scores = q @ k.mT * SCALE
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], float("-inf"), device=x.device).triu(1)
        if hidden_keys is not None:
            scores = scores.masked_fill(hidden_keys[:, None, None], torch.finfo(scores.dtype).min)
        return self.o((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


@dataclass
class Output:
    """A result with names."""

    hidden: Tensor
    pooled: Tensor | None = None


pytree.register_dataclass(Output)
Pair = namedtuple("Pair", ["first", "second"])


class Shared(nn.Module):
    """One layer three times, and once more under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attend()
        self.again = nn.ModuleList([self.layer, self.layer])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        for layer in self.again:
            x = x + layer(x)
        return x


class Returning(nn.Module):
    """The result in a container of a kind."""

    def __init__(self, how: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.how = Attend(), how

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.how(y, y.mean(1))


class Lists(nn.Module):
    """A list of tensors of different lengths comes in, and a dict of masks; each attends to all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attend()

    def forward(self, parts: list[Tensor], more: dict[str, Tensor]) -> list[Tensor]:
        memory = torch.cat(parts, 1)
        return [self.layer(part, memory, hidden_keys=more["hidden"]) for part in parts]


class Towers(nn.Module):
    """Two inputs of different lengths read each other by one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Attend(), Attend()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.a(x, y), y + self.b(y, x)


class Functional(nn.Module):
    """A layer called with other weights than its own: their mean with those of a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = Attend(True), Attend(True)

    def forward(self, x: Tensor) -> Tensor:
        mixed = {
            name: 0.5 * (one + two)
            for (name, one), two in zip(self.layer.named_parameters(), self.other.parameters(), strict=True)
        }
        return torch.func.functional_call(self.layer, mixed, (x,))


class Mapped(nn.Module):
    """A function of one sample mapped over the batch, and over heads inside."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.T / SIZE**0.5
            return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v

        def sample(y: Tensor) -> Tensor:
            parts = (p.unflatten(-1, (HEADS, SIZE)) for p in self.qkv(y).chunk(3, -1))
            return torch.vmap(head, in_dims=1, out_dims=1)(*parts).flatten(-2)

        return torch.vmap(sample)(x)


class Cast(nn.Module):
    """A region in bfloat16, its softmax in float32 as autocast has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attend()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x).float()


class Recomputed(nn.Module):
    """A whole stack under checkpoint, as a function with a mask in its closure."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attend() for _ in range(2))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden_keys = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        for layer in self.layers:
            x = x + checkpoint(functools.partial(layer, hidden_keys=hidden_keys), x, use_reentrant=False)
        return x


class Turned(nn.Module):
    """Queries and keys turned as complex numbers (rotary), heads before time."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        angle = torch.outer(torch.arange(t, device=x.device).float(), 100.0 ** (-torch.arange(0, SIZE, 2) / SIZE))
        turn = torch.polar(torch.ones_like(angle), angle)

        def turned(y: Tensor) -> Tensor:
            z = torch.view_as_complex(y.float().reshape(*y.shape[:-1], -1, 2)) * turn
            return torch.view_as_real(z).flatten(-2).type_as(y)

        return F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True).transpose(1, 2).flatten(2)


class Sampled(nn.Module):
    """No batch at all: [T, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attend(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[0])


class Deep(nn.Module):
    """Five axes: [batch, frames, places, width], attention over places, then over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = Attend(), Attend(True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.space(x)
        return x + self.time(x.transpose(1, 2)).transpose(1, 2)


class Cached(nn.Module):
    """Keys and values of a memory computed once, used by two layers of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.qs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        k, v = self.kv(memory).view(memory.shape[0], -1, 2, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        for q in self.qs:
            asked = q(x).view(x.shape[0], -1, HEADS, SIZE).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(asked, k, v).transpose(1, 2).reshape_as(x)
        return x


class Step(nn.Module):
    """One step of decoding with a buffer written by index_copy, and a mask of the positions that are filled."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.view(x.shape[0], 1, HEADS, SIZE).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        keys, values = keys.index_copy(2, at, k), values.index_copy(2, at, v)
        scores = q @ keys.mT * SCALE
        scores = scores.masked_fill(torch.arange(keys.shape[2], device=x.device) > at, float("-inf"))
        return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2), keys, values


class Options(nn.Module):
    """A forward with keyword-only and default arguments and *args."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attend()

    def forward(self, *x: Tensor, scale: float = 1.0, norm: bool = True) -> Tensor:
        first, second = x
        y = self.layer(first, second) * scale
        return F.layer_norm(y, (WIDTH,)) if norm else y


class PerHeadModules(nn.Module):
    """Each head is a module of its own; their results are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, SIZE) for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        done = []
        for q, k, v in self.heads:
            wei = q(x) @ k(x).transpose(-2, -1) * SCALE
            wei = wei.masked_fill(torch.tril(torch.ones(x.shape[1], x.shape[1], device=x.device)) == 0, float("-inf"))
            done.append(F.softmax(wei, dim=-1) @ v(x))
        return torch.cat(done, dim=-1)


def two(batch: int, time: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, time, WIDTH), torch.randn(batch, time + 3, WIDTH)


def lists(batch: int, time: int) -> tuple[Any, ...]:
    hidden_keys = torch.arange(2 * time + 2) >= (torch.arange(batch)[:, None] + time)
    return [torch.randn(batch, time, WIDTH), torch.randn(batch, time + 2, WIDTH)], {"hidden": hidden_keys}


def lengths(batch: int, time: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, time, WIDTH), torch.arange(batch) + 3


def film(batch: int, time: int) -> tuple[Tensor]:
    return (torch.randn(batch, 5, time, WIDTH),)


def step(batch: int, time: int) -> tuple[Tensor, ...]:
    cache = (torch.randn(batch, HEADS, time, SIZE) for _ in range(2))
    return torch.randn(batch, 1, WIDTH), *cache, torch.tensor([4])


TREES = ("export", "verified", "dynamo")
CASES = (
    Case("one layer three times", Shared, hidden(), (HEADED,) * 3),
    Case("tuple out", partial(Returning, lambda *x: x), hidden(), (HEADED,)),
    Case("dict out", partial(Returning, lambda x, y: {"hidden": x, "pooled": [y, 3]}), hidden(), (HEADED,)),
    Case("dataclass out", partial(Returning, Output), hidden(), (HEADED,)),
    Case("named tuple out", partial(Returning, Pair), hidden(), (HEADED,)),
    Case("list and dict in", Lists, lists, (HEADED | {"phase": "cross"},) * 2, (), TREES),
    Case("two lengths", Towers, two, (HEADED | {"phase": "cross", "mask": "full"},) * 2),
    Case("weights mixed in the call", Functional, hidden(), (HEADED | {"mask": "causal"},)),
    Case("mapped over samples and heads", Mapped, hidden(), (HEADED | {"mask": "causal"},)),
    Case("autocast", Cast, hidden(), ({"heads": HEADS, "head_dim": SIZE},)),
    Case("checkpointed with a mask", Recomputed, lengths, (HEADED,) * 2),
    Case("turned as complex numbers", Turned, hidden(), (HEADED | {"mask": "causal"},)),
    Case("no batch", Sampled, hidden(), (HEADED | {"mask": "causal"},)),
    Case("places, then frames", Deep, film, (HEADED | {"mask": "full"}, HEADED | {"mask": "causal"})),
    Case("memory read twice", Cached, two, (HEADED | {"phase": "cross"},) * 2),
    Case("step of a cache", Step, step, (HEADED | {"phase": "decode"},)),
    Case("any number of arguments", Options, two, (HEADED | {"phase": "cross"},)),
    Case("a module per head", PerHeadModules, hidden(), ({"heads": 1, "head_dim": SIZE, "mask": "causal"},) * 2),
)
