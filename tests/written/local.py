"""Attention to a neighbourhood: windows by unfold and as_strided, blocks, dilation, chunks of queries and of keys."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden
from written.heads import Heads, raw

HEADS, SIZE = 4, 8
SCALE = SIZE**-0.5


def sliding_unfold(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each query sees its own keys, cut out by unfold: the last five."""
    k, v = (F.pad(x, (0, 0, 4, 0)).unfold(2, 5, 1) for x in (k, v))
    scores = torch.einsum("bhtd,bhtdw->bhtw", q, k) * SCALE
    at = torch.arange(q.shape[2], device=q.device)
    outside = at[:, None] - 4 + torch.arange(5, device=q.device) < 0
    return torch.einsum("bhtw,bhtdw->bhtd", scores.masked_fill(outside, float("-inf")).softmax(-1), v)


def sliding_strided(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Overlapping pieces of twice the window by as_strided: a piece of queries against the piece around it."""
    b, h, t, d = q.shape
    w = 2
    n = t // w
    q = q.reshape(b, h, n, w, d)
    k, v = (F.pad(x, (0, 0, w, w)).contiguous() for x in (k, v))
    size, step = (b, h, n, 3 * w, d), (h * (t + 2 * w) * d, (t + 2 * w) * d, w * d, d, 1)
    k, v = k.as_strided(size, step), v.as_strided(size, step)
    scores = q @ k.mT * SCALE
    place = torch.arange(n, device=q.device)[:, None] * w + torch.arange(3 * w, device=q.device) - w
    seen = ((place >= 0) & (place < t))[:, None, :]
    offset = torch.arange(3 * w, device=q.device) - w - torch.arange(w, device=q.device)[:, None]
    scores = scores.masked_fill(~(seen & (offset.abs() <= w)), torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).reshape(b, h, t, d)


def padded_and_folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The length padded to a multiple of four, folded into blocks, and cut again; padding keys are hidden."""
    b, h, t, d = q.shape
    extra = -t % 4
    q, k, v = (F.pad(x, (0, 0, 0, extra)).unflatten(2, (-1, 4)) for x in (q, k, v))
    kept = torch.arange(t + extra, device=q.device).view(-1, 4) < t
    scores = (q @ k.mT * SCALE).masked_fill(~kept[:, None, :], -1e9)
    return (scores.softmax(-1) @ v).flatten(2, 3)[:, :, :t]


def neighbouring_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Blocks of four see the blocks around them; where a key stands is padded and unfolded like the keys themselves."""
    t = q.shape[2]
    blocks = math.ceil(t / 4)
    q, k, v = (F.pad(x.flatten(0, 1), (0, 0, 0, blocks * 4 - t)) for x in (q, k, v))
    q = q.view(q.shape[0], blocks, 4, SIZE)
    at = torch.arange(blocks * 4, device=q.device).view(1, blocks, 4)
    k, v = (F.pad(x, (0, 0, 4, 4)).unfold(1, 12, 4).transpose(2, 3) for x in (k, v))
    keys_at = F.pad(at.view(1, -1), (4, 4), value=-1).unfold(1, 12, 4)
    apart = (at[..., :, None] - keys_at[..., None, :]).abs()
    hidden_keys = (apart > 4) | (keys_at[..., None, :] == -1) | (keys_at[..., None, :] >= t)
    scores = torch.einsum("bnqd,bnkd->bnqk", q, k) * SCALE
    weights = scores.masked_fill(hidden_keys, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("bnqk,bnkd->bnqd", weights, v).flatten(1, 2)[:, :t].unflatten(0, (-1, HEADS))


def dilated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every second token attends to every second token, by a reshape."""
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b, h, t // 2, 2, d).transpose(2, 3) for x in (q, k, v))
    return (raw(q, k).softmax(-1) @ v).transpose(2, 3).reshape(b, h, t, d)


def block_sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Blocks see themselves, both neighbours and the first block, by rolling and joining blocks (BigBird)."""
    b, h, t, d = q.shape
    blocked = [x.view(b, h, t // 4, 4, d) for x in (q, k, v)]
    q_, k_, v_ = blocked
    near = [torch.cat([x.roll(1, 2), x, x.roll(-1, 2), x[:, :, :1].expand_as(x)], 3) for x in (k_, v_)]
    scores = torch.einsum("bhnqd,bhnkd->bhnqk", q_, near[0]) * SCALE
    return torch.einsum("bhnqk,bhnkd->bhnqd", F.softmax(scores, -1), near[1]).reshape(b, h, t, d)


def queries_in_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A loop over chunks of queries: the whole score matrix never exists."""
    t = q.shape[2]
    half = t // 2
    done = []
    for start, stop in ((0, half), (half, t)):
        scores = q[:, :, start:stop] @ k.mT * SCALE
        at = torch.arange(start, stop, device=q.device)[:, None]
        scores = scores.masked_fill(at < torch.arange(t, device=q.device), float("-inf"))
        done.append(scores.softmax(-1) @ v)
    return torch.cat(done, 2)


def keys_in_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An online softmax over three chunks of keys with a running maximum and sum."""
    top = torch.full((*q.shape[:-1], 1), float("-inf"), device=q.device, dtype=q.dtype)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for k_, v_ in zip(k.chunk(3, 2), v.chunk(3, 2), strict=True):
        scores = q @ k_.mT * SCALE
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        p, shrink = (scores - new).exp(), (top - new).exp()
        total, out, top = total * shrink + p.sum(-1, keepdim=True), out * shrink + p @ v_, new
    return out / total


def merged_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two halves of the keys, each with a softmax of its own, merged by the weights of their log-sum-exps."""
    half = k.shape[2] // 2
    parts, lses = [], []
    for k_, v_ in ((k[:, :, :half], v[:, :, :half]), (k[:, :, half:], v[:, :, half:])):
        scores = q @ k_.mT * SCALE
        parts.append(scores.softmax(-1) @ v_)
        lses.append(scores.logsumexp(-1, keepdim=True))
    share = torch.softmax(torch.cat(lses, -1), -1)
    return parts[0] * share[..., :1] + parts[1] * share[..., 1:]


class ThreeBranches(nn.Module):
    """Compressed keys, chosen blocks and a window, added under gates (native sparse attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(SIZE, 3)
        self.shrink = nn.Linear(2 * SIZE, SIZE)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, h, t, d = q.shape
        few_k, few_v = (self.shrink(x.reshape(b, h, t // 2, 2 * d)) for x in (k, v))
        few = raw(q, few_k)
        ends = torch.arange(t // 2, device=q.device) * 2 + 1
        whole = raw(q, k)
        at = torch.arange(t, device=q.device)
        compressed = few.masked_fill(ends > at[:, None] + 1, -1e9).softmax(-1) @ few_v
        distance = at[:, None] - at
        window = whole.masked_fill((distance < 0) | (distance >= 3), float("-inf")).softmax(-1) @ v
        gates = self.gate(q).sigmoid()
        return compressed * gates[..., :1] + window * gates[..., 1:2]


class SpatialReduction(nn.Module):
    """Keys and values of an image shrunk by a strided convolution (PVT), or by a convolution per head axis (CvT)."""

    def __init__(self, convolved: bool) -> None:
        super().__init__()
        self.convolved = convolved
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64)
        self.shrink, self.norm = nn.Conv2d(32, 32, 2, 2), nn.LayerNorm(32)
        self.local = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, s, 1, groups=32, bias=False), nn.BatchNorm2d(32)) for s in (1, 2, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, height, width = x.shape
        if self.convolved:
            q, k, v = (f(x).flatten(2).mT.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for f in self.local)
        else:
            tokens = x.flatten(2).transpose(1, 2)
            q = self.q(tokens).reshape(b, -1, HEADS, SIZE).permute(0, 2, 1, 3)
            few = self.norm(self.shrink(x).reshape(b, c, -1).permute(0, 2, 1))
            k, v = self.kv(few).reshape(b, -1, 2, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        out = (q @ k.transpose(-2, -1) * SCALE).softmax(dim=-1) @ v
        return out.transpose(1, 2).reshape(b, height * width, c)


class CrissCross(nn.Module):
    """A pixel sees its row and its column: one softmax over two products joined."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(32, 4, 1), nn.Conv2d(32, 4, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        over_columns = torch.einsum("bchw,bcgw->bhwg", q, k)
        own = torch.eye(x.shape[2], dtype=torch.bool, device=x.device)[:, None, :]
        over_columns = over_columns.masked_fill(own, float("-inf"))
        over_rows = torch.einsum("bchw,bchg->bhwg", q, k)
        p = torch.cat([over_columns, over_rows], -1).softmax(-1)
        return torch.einsum("bhwg,bcgw->bchw", p[..., : x.shape[2]], v) + torch.einsum(
            "bhwg,bchg->bchw", p[..., x.shape[2] :], v
        )


def gathered_top(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each query attends to the keys that it scores highest, gathered: other keys for every query."""
    scores, chosen = raw(q, k).topk(4, dim=-1)
    values = v.unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1).gather(3, chosen[..., None].expand(*chosen.shape, SIZE))
    return (scores.softmax(-1).unsqueeze(-2) @ values).squeeze(-2)


def pooled_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Landmarks: means of segments stand for keys in one product and for queries in another (Nyström)."""
    b, h, t, d = q.shape
    lq, lk = (x[:, :, : t // 2 * 2].reshape(b, h, 2, t // 2, d).mean(3) for x in (q, k))
    left, middle, right = (raw(x, y).softmax(-1) for x, y in ((q, lk), (lq, lk), (lq, k)))
    return left @ torch.linalg.pinv(middle) @ (right @ v)


def even(batch: int, time: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, time // 2 * 2, 32),)


def in_fours(batch: int, time: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, time // 4 * 4, 32),)


def picture(batch: int, _: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, 32, 6, 4),)


TOKENS = hidden()


def one(
    name: str, core: Any, inputs: Any = TOKENS, refused: tuple[str, ...] = (), *more: dict[str, Any], **words: Any
) -> Case:
    found = () if refused and not words else ({"heads": HEADS, "head_dim": SIZE, **words}, *more)
    make = core if isinstance(core, type) else lambda: core
    return Case(name, lambda: Heads(make()), inputs, found, refused)


CASES = (
    one("window by unfold", sliding_unfold, scale=SCALE, phase="decode"),
    one("window by as_strided", sliding_strided, even),
    one("padded and folded", padded_and_folded, in_fours),
    Case("neighbouring blocks", lambda: Heads(neighbouring_blocks), TOKENS, ({"head_dim": SIZE, "scale": SCALE},)),
    one("dilated by a reshape", dilated, even, mask="full", scale=SCALE),
    one("blocks, neighbours and the first", block_sparse, in_fours, mask="full", scale=SCALE),
    one("chunks of queries", queries_in_chunks, even, (), {"heads": HEADS}, scale=SCALE),
    one("chunks of keys", keys_in_chunks, refused=("",)),
    one("halves merged by their sums", merged_parts, even, ("",), {"heads": HEADS}, scale=SCALE),
    one("three branches", ThreeBranches, even, (), {"mask": "causal & window(3)"}, scale=SCALE),
    Case("reduced keys", partial(SpatialReduction, False), picture, ({"heads": HEADS, "head_dim": SIZE, "phase": "cross"},)),
    Case("convolved projections", partial(SpatialReduction, True), picture, ({"heads": HEADS, "phase": "cross"},)),
    Case("rows and columns in one softmax", CrissCross, picture, (), ("",)),
    one("keys chosen per query", gathered_top, refused=("",)),
    one("landmarks", pooled_queries, even, ("",), {"heads": HEADS}, scale=SCALE),
)  # fmt: skip
