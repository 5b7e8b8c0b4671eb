"""Attention as the code beside well-known papers writes it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case

WIDTH, HEADS, SIZE = 32, 4, 8
Tensor = torch.Tensor


class RowsAndColumns(nn.Module):
    """Biases of the distance in rows and in columns, added while the keys are viewed as a picture (MViTv2, SAM)."""

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.rows, self.columns = (nn.Parameter(torch.randn(2 * side - 1, SIZE)) for _ in range(2))

    @staticmethod
    def table(tensor: Tensor, side: int) -> Tensor:
        place = torch.arange(side)
        return tensor[place[:, None] - place[None, :] + side - 1]

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        q, k, v = (
            self.qkv(x).reshape(b, h * w, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).reshape(3, b * HEADS, h * w, SIZE)
        )
        scores = (q * SIZE**-0.5) @ k.transpose(-2, -1)
        picture = q.reshape(-1, h, w, SIZE)
        by_row = torch.einsum("bhwc,hkc->bhwk", picture, self.table(self.rows, h))
        by_column = torch.einsum("bhwc,wkc->bhwk", picture, self.table(self.columns, w))
        scores = scores.view(-1, h, w, h, w) + by_row[..., :, None] + by_column[..., None, :]
        out = scores.view(-1, h * w, h * w).softmax(-1) @ v
        return out.view(b, HEADS, h, w, SIZE).permute(0, 2, 3, 1, 4).reshape(b, h, w, WIDTH)


class MaskOfBoth(nn.Module):
    """Padding and later positions in one mask, its type taken from `.data`; hidden scores are -1e9 (annotated transformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        later = torch.triu(torch.ones(1, x.size(1), x.size(1)), diagonal=1).type(torch.uint8) == 0
        seen = (ids != 0).unsqueeze(-2)
        seen = (seen & later.type_as(seen.data)).unsqueeze(1)
        q, k, v = (f(x).view(x.size(0), -1, HEADS, SIZE).transpose(1, 2) for f in self.projections[:3])
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        p = scores.masked_fill(seen == 0, -1e9).softmax(dim=-1)
        return self.projections[3](torch.matmul(p, v).transpose(1, 2).contiguous().view(x.size(0), -1, WIDTH))


class MaskedQueries(nn.Module):
    """Object queries read the pixels of their own masks, one mask a head, all pixels where a mask is empty (Mask2Former)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, queries: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        hidden = hidden & ~(hidden.sum(-1, keepdim=True) == hidden.shape[-1])
        return queries + self.attention(queries, memory, memory, attn_mask=hidden, need_weights=False)[0]


class PairBias(nn.Module):
    """A bias from pairs of residues and one of padding, heads behind ellipses, a gated result (AlphaFold)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.gate, self.out, self.pair = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(6, HEADS, bias=False),
        )

    def forward(self, x: Tensor, pairs: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:-1], HEADS, -1) for f in (self.q, self.k, self.v))
        scores = torch.einsum("...qhd,...khd->...hqk", q / math.sqrt(SIZE), k)
        scores = scores + (1e9 * (mask - 1))[..., None, None, :] + self.pair(pairs).permute(0, 3, 1, 2)
        out = torch.einsum("...hqk,...khd->...qhd", F.softmax(scores, -1), v)
        return self.out((out * torch.sigmoid(self.gate(x)).view(*x.shape[:-1], HEADS, -1)).reshape(x.shape))


class TiedRows(nn.Module):
    """One map of attention for all sequences of an alignment: scores are summed over them (MSA Transformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:3], HEADS, SIZE) for f in (self.q, self.k, self.v))
        p = torch.einsum("brihd,brjhd->bhij", q * (SIZE * x.shape[1]) ** -0.5, k).softmax(-1)
        return torch.einsum("bhij,brjhd->brihd", p, v).reshape(x.shape)


class ChannelsFirst(nn.Module):
    """Signals as [batch, channels, length], heads counted with the batch, the root of the scale on both sides (ADM)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(4, WIDTH),
            nn.Conv1d(WIDTH, 3 * WIDTH, 1),
            nn.Conv1d(WIDTH, WIDTH, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, t = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b * HEADS, 3 * SIZE, t).split(SIZE, dim=1)
        scale = SIZE**-0.25
        p = torch.einsum("bct,bcs->bts", q * scale, k * scale).float().softmax(dim=-1)
        return x + self.out(torch.einsum("bts,bcs->bct", p.to(v.dtype), v).reshape(b, -1, t))


class OverStreams(nn.Module):
    """One learned query, the same at all positions, over the residual streams of each (attention over depth)."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        streams = F.layer_norm(torch.stack([x, y, z], -2), (WIDTH,))
        query = self.query.view(-1, WIDTH).expand(*streams.shape[:-2], -1, -1)
        return F.scaled_dot_product_attention(query, streams, streams).squeeze(-2)


def queries_and_masks(batch: int, time: int) -> tuple[Tensor, ...]:
    return torch.randn(5, batch, WIDTH), torch.randn(time, batch, WIDTH), torch.rand(batch * HEADS, 5, time) > 0.5


def with_ids(batch: int, time: int) -> tuple[Tensor, ...]:
    ids = torch.randint(0, 3, (batch, time))
    ids[:, 0] = 1
    return torch.randn(batch, time, WIDTH), ids


def residues(batch: int, time: int) -> tuple[Tensor, ...]:
    mask = (torch.rand(batch, time) > 0.2).float()
    return torch.randn(batch, time, WIDTH), torch.randn(batch, time, time, 6), mask


HEADED = {"heads": HEADS, "kv_heads": HEADS, "head_dim": SIZE, "scale": SIZE**-0.5}
CASES = (
    Case("rows and columns", RowsAndColumns, lambda b, _: (torch.randn(b, 4, 4, WIDTH),), ({"biases": 2, "scale": SIZE**-0.5},)),
    Case("mask of both", MaskOfBoth, with_ids, (HEADED | {"mask": "causal & padding(ids)", "empty_rows": "mean"},),
        dialects=("export", "verified", "dynamo")),
    Case("masked queries", MaskedQueries, queries_and_masks, (HEADED | {"mask": "opaque"},)),
    Case("pair bias", PairBias, residues, (HEADED | {"mask": "full", "biases": 2},)),
    Case("channels first", ChannelsFirst, lambda b, t: (torch.randn(b, WIDTH, t),), ({"head_dim": SIZE, "scale": SIZE**-0.5},)),
    Case("over streams", OverStreams, lambda b, t: tuple(torch.randn(b, t, WIDTH) for _ in range(3)),
        ({"head_dim": WIDTH, "mask": "full", "biases": 0},), quick=("export", "dynamo")),
    Case("tied rows", TiedRows, lambda b, t: (torch.randn(b, 5, t, WIDTH),), ({"heads": HEADS, "head_dim": 5 * SIZE},), dialects=("export", "verified", "dynamo")),
)  # fmt: skip
