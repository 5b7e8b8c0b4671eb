"""Attention over cached keys: one new token or a few, buffers written by position, cached tensors given as inputs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden

WIDTH, HEADS, SIZE = 32, 4, 8
LONGEST = 24


class KeyValueBuffer(nn.Module):
    """Keys and values of every position up to the longest, overwritten in place at given positions."""

    def __init__(self, batch: int, groups: int) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, groups, LONGEST, SIZE))
        self.register_buffer("v_cache", torch.zeros(batch, groups, LONGEST, SIZE))

    def update(self, at: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.k_cache[:, :, at] = k
        self.v_cache[:, :, at] = v
        return self.k_cache, self.v_cache


class StaticLayer(nn.Module):
    """New tokens at `input_pos` write the buffer and see all of it under the rows of one triangle."""

    def __init__(self, groups: int = 2, sdpa: bool = True, batch: int = 2) -> None:
        super().__init__()
        self.groups, self.sdpa = groups, sdpa
        self.wqkv = nn.Linear(WIDTH, (HEADS + 2 * groups) * SIZE, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.cache = KeyValueBuffer(batch, groups)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        kv = self.groups * SIZE
        q, k, v = self.wqkv(x).split([WIDTH, kv, kv], dim=-1)
        q = q.view(b, t, HEADS, SIZE).transpose(1, 2)
        k, v = (y.view(b, t, self.groups, SIZE).transpose(1, 2) for y in (k, v))
        k, v = self.cache.update(input_pos, k, v)
        k = k.repeat_interleave(HEADS // self.groups, dim=1)
        v = v.repeat_interleave(HEADS // self.groups, dim=1)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        else:
            y = (q @ k.transpose(-2, -1) / math.sqrt(SIZE)).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return self.wo(y.transpose(1, 2).contiguous().view(b, t, WIDTH))


class StaticDecoder(nn.Module):
    """Two static layers under the rows `input_pos` of a triangle that the model keeps."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StaticLayer(**settings) for _ in range(2))
        self.register_buffer("causal_mask", torch.tril(torch.ones(LONGEST, LONGEST, dtype=torch.bool)))

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        mask = self.causal_mask[None, None, input_pos]
        for layer in self.layers:
            x = x + layer(x, mask, input_pos)
        return x


class SlicedCache(nn.Module):
    """A buffer [B, longest, H, D] written and read by slices; the start is fixed."""

    def __init__(self, start: int, batch: int = 2) -> None:
        super().__init__()
        self.start = start
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.cache_k = nn.Buffer(torch.randn(batch, LONGEST, HEADS, SIZE))
        self.cache_v = nn.Buffer(torch.randn(batch, LONGEST, HEADS, SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        xq, xk, xv = (w(x).view(b, t, HEADS, SIZE) for w in (self.wq, self.wk, self.wv))
        self.cache_k[:b, self.start : self.start + t] = xk
        self.cache_v[:b, self.start : self.start + t] = xv
        keys, values = self.cache_k[:b, : self.start + t], self.cache_v[:b, : self.start + t]
        scores = torch.matmul(xq.transpose(1, 2), keys.permute(0, 2, 3, 1)) / math.sqrt(SIZE)
        mask = torch.full((t, t), -torch.inf).triu(1)
        scores = scores + torch.hstack([torch.zeros(t, self.start), mask])
        return torch.matmul(torch.softmax(scores, -1), values.transpose(1, 2)).transpose(1, 2).reshape(b, t, WIDTH)


class GivenCache(nn.Module):
    """One step: past keys and values are inputs, the longer ones are returned."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv = how, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, HEADS, SIZE).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        n = past_k.shape[2]
        if self.how == "sdpa":
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            seen = torch.arange(n + t)[None] <= torch.arange(t)[:, None] + n
            o = torch.softmax((q @ k.mT * SIZE**-0.5).masked_fill(~seen, -torch.inf), -1) @ v
        return o.transpose(1, 2).reshape(b, t, WIDTH), k, v


class FilledSoFar(nn.Module):
    """Keys of the longest length of which `filled` are there; further ones are hidden by their position."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, SIZE).transpose(1, 2)
        there = torch.arange(k.shape[2])[None] < filled[:, None]
        scores = (q @ k.mT * SIZE**-0.5).masked_fill(~there[:, None, None], torch.finfo(q.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, WIDTH)


class Latent(nn.Module):
    """Keys and values come from one narrow latent; keys get a rotary part that all heads share; values are wider."""

    def __init__(self, absorbed: bool = False) -> None:
        super().__init__()
        self.absorbed = absorbed
        self.q, self.down = nn.Linear(WIDTH, HEADS * 12), nn.Linear(WIDTH, 16 + 4)
        self.norm, self.up = nn.RMSNorm(16), nn.Linear(16, HEADS * (8 + 10), bias=False)
        self.out = nn.Linear(HEADS * 10, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q_plain, q_turned = self.q(x).view(b, t, HEADS, 12).transpose(1, 2).split([8, 4], -1)
        latent, k_turned = self.down(x).split([16, 4], -1)
        latent = self.norm(latent)
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        if self.absorbed:
            up_k, up_v = self.up.weight.view(HEADS, 18, 16).split([8, 10], 1)
            q_latent = torch.einsum("bhtd,hdc->bhtc", q_plain, up_k)
            scores = torch.einsum("bhtc,bsc->bhts", q_latent, latent) + torch.einsum(
                "bhtr,bsr->bhts", q_turned, k_turned
            )
            weights = (scores * 12**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            o = torch.einsum("bhtc,hdc->bhtd", torch.einsum("bhts,bsc->bhtc", weights, latent), up_v)
        else:
            k_plain, v = self.up(latent).view(b, t, HEADS, 18).transpose(1, 2).split([8, 10], -1)
            q = torch.cat([q_plain, q_turned], -1)
            k = torch.cat([k_plain, k_turned[:, None].expand(-1, HEADS, -1, -1)], -1)
            o = torch.softmax((q @ k.mT * 12**-0.5).masked_fill(~seen, -torch.inf), -1) @ v
        return self.out(o.transpose(1, 2).flatten(2))


class SharedKeys(nn.Module):
    """Two layers attend to the keys and values of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.qs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        k, v = (y.view(b, t, HEADS, SIZE).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        for to_q in self.qs:
            q = to_q(x).view(b, t, HEADS, SIZE).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


def with_positions(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, time, WIDTH), torch.arange(time)


def one_position(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 1, WIDTH), torch.tensor([time])


def past(new: int) -> Any:
    def inputs(batch: int, time: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(batch, new, WIDTH), *(torch.randn(batch, HEADS, time, SIZE) for _ in range(2))

    return inputs


def filled(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    caches = (torch.randn(batch, HEADS, time, SIZE) for _ in range(2))
    return torch.randn(batch, 1, WIDTH), *caches, torch.arange(batch) + 3


def two_rows(batch: int, time: int) -> tuple[torch.Tensor]:
    return (torch.randn(2, time, WIDTH),)


GROUPED = {"heads": HEADS, "kv_heads": 2, "head_dim": SIZE}
HEADED = {"heads": HEADS, "head_dim": SIZE, "scale": SIZE**-0.5}

CASES = (
    Case("static cache, prompt", StaticDecoder, with_positions, (GROUPED,) * 2),
    Case("static cache, one token", StaticDecoder, one_position, (GROUPED,) * 2),
    Case("static cache, one token, written out", partial(StaticDecoder, sdpa=False), one_position, (GROUPED,) * 2),
    Case("static cache, one group", partial(StaticDecoder, groups=1), one_position, (GROUPED | {"kv_heads": 1},) * 2),
    Case("cache slices from the start", partial(SlicedCache, 0), two_rows, (HEADED | {"mask": "causal"},)),
    Case("cache slices after five", partial(SlicedCache, 5), two_rows, (HEADED | {"mask": "causal(5)"},)),
    Case("past given, one token, sdpa", partial(GivenCache, "sdpa"), past(1), (HEADED | {"mask": "full", "phase": "decode"},)),
    Case("past given, one token, mask", partial(GivenCache, "mask"), past(1), (HEADED | {"phase": "decode"},)),
    Case("past given, three tokens, mask", partial(GivenCache, "mask"), past(3), (HEADED,)),
    Case("cache filled so far", FilledSoFar, filled, (HEADED | {"mask": "lengths(filled)", "empty_rows": "mean"},)),
    Case("latent keys and values", Latent, hidden(),
         ({"heads": HEADS, "head_dim": 12, "value_dim": 10, "scale": 12**-0.5, "mask": "causal"},)),
    Case("latent keys, absorbed", partial(Latent, True), hidden(),
         ({"heads": HEADS, "kv_heads": 1, "value_dim": 16, "biases": 1, "mask": "causal"},)),
    Case("three layers on one cache", SharedKeys, hidden(), (HEADED | {"mask": "causal"},) * 3),
)  # fmt: skip
