"""Positions between queries and keys: shifts, skews, buckets and learned functions of the distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden
from written.heads import Heads, causal, columns, raw, rows

HEADS, SIZE = 4, 8
SCALE = SIZE**-0.5


class ShiftedPositions(nn.Module):
    """Scores of content and of sinusoidal distance, the second moved into place by pad, view and slice (Transformer-XL)."""

    def __init__(self, both_sides: bool) -> None:
        super().__init__()
        self.both_sides = both_sides
        self.u, self.v = (nn.Parameter(torch.randn(HEADS, SIZE) * 0.1) for _ in range(2))
        self.r = nn.Linear(32, HEADS * SIZE, bias=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        t = q.shape[-2]
        distance = torch.arange(t - 1, -t if self.both_sides else -1, -1.0, device=q.device, dtype=q.dtype)
        angles = distance[:, None] * 10000 ** (-torch.arange(0, 16, device=q.device, dtype=q.dtype) / 16)
        r = self.r(torch.cat([angles.sin(), angles.cos()], -1)).view(-1, HEADS, SIZE).transpose(0, 1)
        content = (q + self.u[:, None]) @ k.transpose(-2, -1)
        place = self.shifted((q + self.v[:, None]) @ r.transpose(-2, -1))[..., :t]
        scores = (content + place) * SCALE
        if not self.both_sides:
            scores = scores.masked_fill(~causal(scores), float("-inf"))
        return scores.softmax(-1) @ v

    @staticmethod
    def shifted(x: torch.Tensor) -> torch.Tensor:
        b, h, t, n = x.shape
        x = F.pad(x, (1, 0)).view(b, h, n + 1, t)
        return x[:, :, 1:].reshape(b, h, t, n)


class Skewed(nn.Module):
    """Relative logits q·E, skewed so that column j of row i holds the embedding of distance i - j (Music Transformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, 16, SIZE))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, h, t, _ = q.shape
        logits = torch.einsum("bhld,hmd->bhlm", q, self.table[:, -t:])
        skewed = F.pad(logits, (1, 0)).reshape(b, h, t + 1, t)[:, :, 1:]
        scores = (torch.einsum("bhld,bhmd->bhlm", q, k) + skewed) / math.sqrt(SIZE)
        scores = scores.masked_fill(torch.triu(torch.ones(t, t, device=q.device), 1).bool(), -1e9)
        return torch.einsum("bhlm,bhmd->bhld", scores.softmax(-1), v)


class Buckets(nn.Module):
    """A learned bias per logarithmic bucket of the distance, computed in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, HEADS)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT
        offset = columns(scores) - rows(scores)
        side = (offset > 0).long() * 8
        n = offset.abs()
        far = 4 + (torch.log(n.float().clamp(min=1) / 4) / math.log(16 / 4) * 4).long()
        bucket = side + torch.where(n < 4, n, torch.minimum(far, torch.full_like(far, 7)))
        bias = self.table(bucket).permute(2, 0, 1)[None]
        return F.softmax((scores + bias).float(), dim=-1).type_as(scores) @ v


class LogDistance(nn.Module):
    """-a·log(1 + b·|i - j|) with learned a and b per head (KERPLE)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.rand(HEADS, 1, 1) + 0.1) for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = raw(q, k)
        distance = (rows(scores) - columns(scores)).abs()
        scores = scores - self.a.clamp(min=0.01) * torch.log1p(self.b.clamp(min=0.01) * distance)
        return scores.masked_fill(~causal(scores), torch.finfo(scores.dtype).min).softmax(-1) @ v


class DistanceNetwork(nn.Module):
    """A small network of the normalised log distance (FIRE)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 12), nn.ReLU(), nn.Linear(12, HEADS))
        self.c, self.threshold = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(8.0))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[-2], dtype=q.dtype, device=q.device)
        distance = (at[:, None] - at[None, :]).abs()
        norm = torch.maximum(at, self.threshold.abs())[:, None]
        level = torch.log(self.c.abs() * distance + 1) / torch.log(self.c.abs() * norm + 1)
        bias = self.net(level.unsqueeze(-1)).permute(2, 0, 1)
        scores = raw(q, k) + bias
        hidden_part = torch.full_like(scores, float("-inf")).triu(1)
        return (scores + hidden_part).softmax(-1) @ v


class Disentangled(nn.Module):
    """Content to position and position to content, gathered by distance (DeBERTa)."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(10, HEADS * SIZE) * 0.1)
        self.pq, self.pk = (nn.Linear(HEADS * SIZE, HEADS * SIZE) for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, h, t, d = q.shape
        pq, pk = (w(self.places).view(10, HEADS, SIZE).transpose(0, 1) for w in (self.pq, self.pk))
        at = torch.arange(t, device=q.device)
        index = (at[:, None] - at[None, :] + 5).clamp(0, 9).expand(b, h, t, t)
        scale = 1 / math.sqrt(d * 3)
        c2p = torch.gather(q @ pk.mT * scale, -1, index)
        p2c = torch.gather(k @ pq.mT * scale, -1, index.mT).transpose(-1, -2)
        return (q @ k.mT * scale + c2p + p2c).softmax(-1) @ v


class RelativeValues(nn.Module):
    """Embeddings of clipped distances on keys and on values (Shaw): the second uses the probabilities once more."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.values = values
        self.k_table, self.v_table = (nn.Embedding(9, SIZE) for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT
        distance = (columns(scores) - rows(scores)).clamp(-4, 4) + 4
        scores = (scores + torch.einsum("bhtd,tsd->bhts", q, self.k_table(distance))) * SCALE
        p = scores.softmax(-1)
        out = p @ v
        return out + torch.einsum("bhts,tsd->bhtd", p, self.v_table(distance)) if self.values else out


class LogitScale(nn.Module):
    """Cosine similarity times a learned scale per head that is clamped (Swin V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()).softmax(-1) @ v


class Decays(nn.Module):
    """A penalty per head on the distance, in four ways that people make it (ALiBi)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("slopes", torch.tensor([2.0 ** -(2 * n + 2) for n in range(HEADS)]))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        t = q.shape[-2]
        at = torch.arange(t, device=q.device)
        if self.how == "keys":
            bias = self.slopes.view(1, -1, 1, 1) * at
        elif self.how == "triangle":
            bias = (at[None, :] - at[:, None]).tril()[None] * self.slopes[:, None, None]
        elif self.how == "cumulative":
            bias = -(torch.ones(t, t, device=q.device, dtype=q.dtype).tril().cumsum(0).tril() - 1).clamp(min=0)
            bias = bias * self.slopes.view(-1, 1, 1)
        else:
            bias = torch.einsum("h,ij->hij", self.slopes, -(at[:, None] - at).abs().to(q.dtype))
        scores = torch.baddbmm(
            bias.to(q.dtype).expand(q.shape[0], HEADS, t if self.how != "keys" else 1, t)
            .reshape(-1, t if self.how != "keys" else 1, t),
            q.flatten(0, 1), k.flatten(0, 1).mT, beta=1.0, alpha=SCALE,
        ).view(-1, HEADS, t, t)  # fmt: skip
        if self.how != "both":
            scores = torch.where(at[:, None] >= at, scores, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v


class AllButTheFirst(nn.Module):
    """A bias written into the scores in place, for all tokens but the class token (MViTv2), or for all keys but the first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.pairs, self.keys = nn.Parameter(torch.randn(HEADS, 32, 32)), nn.Parameter(torch.randn(32))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = raw(q, k)
        rest = q.shape[2] - 1
        if self.how == "pairs":
            scores[:, :, 1:, 1:] += self.pairs[:, :rest, :rest]
        elif self.how == "queries":
            scores[:, :, 1:, 1:] += torch.einsum("bhid,hjd->bhij", q[:, :, 1:], self.pairs[:, :rest, :SIZE])
        elif self.how == "keys":
            scores[..., 1:] -= self.keys[:rest]
        elif self.how == "factor":
            scores[:, :, 1:, 1:] *= 2
        else:
            scores[:, :, 1:, 1:] += scores[:, :, 1:, 1:].sigmoid()
        return scores.softmax(-1) @ v


class ContextualGate(nn.Module):
    """Positions counted by gates that the scores decide (CoPE): a bias computed from the scores themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(SIZE, 17))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = raw(q, k)
        scores = scores.masked_fill(~causal(scores), float("-inf"))
        place = scores.sigmoid().flip(-1).cumsum(-1).flip(-1).clamp(max=16)
        low, high = place.floor().long(), place.ceil().long()
        table = q @ self.places
        share = place - low
        bias = table.gather(-1, high) * share + table.gather(-1, low) * (1 - share)
        return (scores + bias).softmax(-1) @ v


def one(name: str, core: Callable[[], nn.Module], refused: tuple[str, ...] = (), **words: object) -> Case:
    found = () if refused else ({"heads": HEADS, "head_dim": SIZE, **words},)
    return Case(name, lambda: Heads(core()), hidden(), found, refused)


CASES = (
    one("shifted positions", partial(ShiftedPositions, False), scale=SCALE, biases=1, mask="causal"),
    one("shifted positions, both sides", partial(ShiftedPositions, True), scale=SCALE, biases=1, mask="full"),
    one("skewed positions", Skewed, scale=SCALE, biases=1, mask="causal"),
    one("buckets in the forward", Buckets, scale=1.0, biases=1, mask="full"),
    one("log distance", LogDistance, scale=SCALE, biases=1, mask="causal"),
    one("network of the distance", DistanceNetwork, scale=SCALE, biases=1, mask="causal"),
    one("disentangled", Disentangled, scale=(3 * SIZE) ** -0.5, biases=2, mask="full"),
    one("relative keys", partial(RelativeValues, False), scale=SCALE, biases=1),
    one("relative keys and values", partial(RelativeValues, True), ("other uses",)),
    one("clamped logit scale", LogitScale, scale=1.0, gain=True),
    one("decay of keys", partial(Decays, "keys"), biases=1, mask="causal", scale=SCALE),
    one("decay of a triangle", partial(Decays, "triangle"), biases=1, mask="causal", scale=SCALE),
    one("decay by a running sum", partial(Decays, "cumulative"), biases=1, mask="causal", scale=SCALE),
    one("decay on both sides", partial(Decays, "both"), biases=1, mask="full", scale=SCALE),
    one("all but the class token", partial(AllButTheFirst, "pairs"), scale=SCALE, biases=1),
    one("all but the class token, by queries", partial(AllButTheFirst, "queries"), scale=SCALE, biases=1),
    one("all keys but the first", partial(AllButTheFirst, "keys"), scale=SCALE, biases=1),
    one("a factor of all but the first", partial(AllButTheFirst, "factor"), ("slice_scatter",)),
    one("a part plus its own sigmoid", partial(AllButTheFirst, "own"), ("computed from",)),
    one("contextual positions", ContextualGate, ("computed from",)),
)
