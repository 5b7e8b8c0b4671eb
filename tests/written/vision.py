"""Attention over images and feature maps: patches, windows, axes, channels, and detection by queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden

WIDTH, HEADS, SIZE = 32, 4, 8


class PatchAttention(nn.Module):
    """One projection, reshaped and permuted to q, k and v; optional norms; fused or written out."""

    def __init__(self, fused: bool = False, norms: bool = False, how: str = "unbind") -> None:
        super().__init__()
        self.scale, self.fused, self.how = SIZE**-0.5, fused, how
        self.qkv, self.proj = nn.Linear(WIDTH, WIDTH * 3, bias=True), nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.LayerNorm(SIZE) if norms else nn.Identity()
        self.k_norm = nn.LayerNorm(SIZE) if norms else nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if self.how == "unbind" else (qkv[0], qkv[1], qkv[2])
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
            x = self.attn_drop(attn) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, n, c)))


class Patches(nn.Module):
    """An image to patches, a class token, two blocks, class logits."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 17, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(PatchAttention(fused) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x[:, 0])


def window_index(w: int) -> torch.Tensor:
    """[w², w²]: where the bias of two places of a window stands in its table."""
    at = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
    apart = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + w - 1
    return apart[..., 0] * (2 * w - 1) + apart[..., 1]


def shifted_mask(h: int, w: int, window: int, shift: int, hidden_by: float) -> torch.Tensor:
    """[windows, w², w²]: places that come from different regions after a cyclic shift."""
    region = torch.zeros(1, h, w, 1)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            region[:, rows, columns] = 3 * i + j
    flat = windows(region, window).view(-1, window * window)
    apart = flat.unsqueeze(1) - flat.unsqueeze(2)
    return apart.masked_fill(apart != 0, hidden_by).masked_fill(apart == 0, 0.0)


def windows(x: torch.Tensor, w: int) -> torch.Tensor:
    """[B, H, W, C] → [B·windows, w, w, C]."""
    b, h, wide, c = x.shape
    return x.view(b, h // w, w, wide // w, w, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w, w, c)


def unwindowed(x: torch.Tensor, w: int, h: int, wide: int) -> torch.Tensor:
    """The inverse of `windows`."""
    b = x.shape[0] // (h * wide // w // w)
    return x.view(b, h // w, wide // w, w, w, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, wide, -1)


class WindowBlock(nn.Module):
    """Attention inside windows of a map, shifted or not, with a table of relative positions."""

    def __init__(
        self, shift: int, cosine: bool = False, hidden_by: float = -100.0, window: int = 4, side: int = 8
    ) -> None:
        super().__init__()
        self.shift, self.window, self.cosine = shift, window, cosine
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, HEADS))
        self.register_buffer("index", window_index(window))
        self.register_buffer("mask", shifted_mask(side, side, window, shift, hidden_by) if shift else None)
        self.tau = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        b_, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b_, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        if self.cosine:
            attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            attn = attn * torch.clamp(self.tau, max=math.log(1.0 / 0.01)).exp()
        else:
            attn = (q * SIZE**-0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if self.mask is not None:
            nw = self.mask.shape[0]
            attn = attn.view(b_ // nw, nw, HEADS, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, HEADS, n, n)
        return self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(b_, n, c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = self.attend(windows(x, self.window).view(-1, self.window**2, c))
        x = unwindowed(y.view(-1, self.window, self.window, c), self.window, h, w)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2)) if self.shift else x


class QueriesToMemory(nn.Module):
    """Object queries attend to a flattened map by bmm; positions are added to queries and keys but not to values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.queries = nn.Parameter(torch.randn(6, WIDTH))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, C] → [B·H, T, D]."""
        b, t, _ = x.shape
        return x.view(b, t, HEADS, SIZE).transpose(1, 2).reshape(b * HEADS, t, SIZE)

    def forward(self, memory: torch.Tensor, place: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        b, s, _ = memory.shape
        asked = self.queries.unsqueeze(0).expand(b, -1, -1)
        n = asked.shape[1]
        q = self.split(self.q(asked) * SIZE**-0.5)
        k, v = self.split(self.k(memory + place)), self.split(self.v(memory))
        scores = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, n, s)
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf")).view(b * HEADS, n, s)
        out = torch.bmm(torch.softmax(scores, -1), v).view(b, HEADS, n, SIZE).transpose(1, 2)
        return self.o(out.reshape(b, n, WIDTH))


class MapAttention(nn.Module):
    """Every place of a map attends to every other, with 1×1 convolutions and a gate that starts at some number."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.f, self.g, self.h = nn.Conv1d(WIDTH, 8, 1), nn.Conv1d(WIDTH, 8, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.gamma, self.pooled = nn.Parameter(torch.tensor(0.3)), pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape
        x = x.view(*size[:2], -1)
        f, g, h = self.f(x), self.g(x), self.h(x)
        if self.pooled:
            f, h = F.max_pool1d(f, 2), F.max_pool1d(h, 2)
            beta = F.softmax(torch.bmm(g.transpose(1, 2), f), dim=-1)
            o = torch.bmm(h, beta.transpose(1, 2))
        else:
            beta = F.softmax(torch.bmm(f.transpose(1, 2), g), dim=1)
            o = torch.bmm(h, beta)
        return (self.gamma * o + x).view(size).contiguous()


class Axial(nn.Module):
    """Rows attend along their columns, then columns along their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        q, k, v = self.rows(x).view(b, h, w, 3, HEADS, SIZE).permute(3, 0, 1, 4, 2, 5)
        x = x + (torch.softmax(q @ k.mT * SIZE**-0.5, -1) @ v).transpose(2, 3).reshape(b, h, w, c)
        q, k, v = self.columns(x).view(b, h, w, 3, HEADS, SIZE).permute(3, 0, 2, 4, 1, 5)
        o = torch.softmax(q @ k.mT * SIZE**-0.5, -1) @ v
        return x + o.permute(0, 3, 1, 2, 4).reshape(b, h, w, c)


class AxialSdpa(Axial):
    """The same by SDPA on five axes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        q, k, v = self.rows(x).view(b, h, w, 3, HEADS, SIZE).permute(3, 0, 1, 4, 2, 5).unbind(0)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, h, w, c)


class ChannelAttention(nn.Module):
    """Channels attend to channels: the transpose of what tokens do, with the image as the features."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.tau = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = (y.reshape(b, HEADS, c // HEADS, h * w) for y in self.qkv(x).chunk(3, 1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return (((q @ k.transpose(-2, -1)) * self.tau).softmax(-1) @ v).view(b, c, h, w)


class SqueezeAndExcite(nn.Module):
    """A gate per channel: no attention between places."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.softmax(self.up(F.relu(self.down(x.mean((2, 3))))), -1)
        return x * gate[:, :, None, None]


class GlobalContext(nn.Module):
    """One softmax over places weights a pooled vector, the same for all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Conv2d(WIDTH, 1, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.key(x).flatten(2), -1)
        context = torch.bmm(x.flatten(2), weights.transpose(1, 2)).squeeze(-1)
        return x + self.value(context)[:, :, None, None]


def image(batch: int, _: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, 3, 16, 16),)


def square(batch: int, _: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, 8, 8, WIDTH),)


def channels_first(batch: int, _: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, WIDTH, 6, 6),)


def memory(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    padding = torch.arange(time)[None] >= (torch.arange(batch)[:, None] % 3 + 4)
    return torch.randn(batch, time, WIDTH), torch.randn(batch, time, WIDTH), padding


def one(name: str, build: Callable[[], nn.Module], inputs: Any, **words: Any) -> Case:
    return Case(name, build, inputs, (words,))


HEADED = {"heads": HEADS, "head_dim": SIZE, "scale": SIZE**-0.5}

CASES = (
    one("patch attention", PatchAttention, hidden(), **HEADED, mask="full"),
    one("patch attention, indexed", partial(PatchAttention, how="index"), hidden(), **HEADED),
    one("patch attention, norms", partial(PatchAttention, norms=True), hidden(), **HEADED),
    one("patch attention, fused", partial(PatchAttention, True, True), hidden(), **HEADED),
    Case("image classifier", partial(Patches, False), image, (HEADED,) * 2),
    Case("image classifier, fused", partial(Patches, True), image, (HEADED,) * 2),
    one("windows", partial(WindowBlock, 0), square, **HEADED, biases=1),
    one("shifted windows", partial(WindowBlock, 2), square, **HEADED, biases=2, mask="full"),
    one("shifted windows hidden by -inf", partial(WindowBlock, 2, hidden_by=-math.inf), square, heads=HEADS),
    one("shifted windows, cosine", partial(WindowBlock, 2, True), square, heads=HEADS, biases=2, scale=1.0),
    one("object queries", QueriesToMemory, memory, heads=HEADS, head_dim=SIZE, mask="keys(padding[b, kv] == 0)", phase="cross"),
    one("map attention", MapAttention, channels_first, head_dim=8, value_dim=WIDTH, scale=1.0),
    one("map attention, pooled keys", partial(MapAttention, True), channels_first, head_dim=8, value_dim=WIDTH),
    Case("rows, then columns", Axial, square, (HEADED,) * 2),
    one("rows by sdpa on five axes", AxialSdpa, square, **HEADED),
    Case("channels attend to channels", ChannelAttention, channels_first, (), ("",), ("export", "verified")),
    Case("gate per channel", SqueezeAndExcite, channels_first, (), ("projection",)),
    Case("global context", GlobalContext, channels_first, (), ("",)),
)  # fmt: skip
