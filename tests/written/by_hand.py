"""Products, sums and softmaxes put together by hand, distances, compiled submodules, and what only resembles them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import DIALECTS, Case, hidden, token_ids
from written.not_attention import WIDTH, Layer

Tensor = torch.Tensor
QUIET = torch.tensor([[-0.7]])


def one_head(weigh: Callable[[Tensor], Tensor], x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Attention with one head whose weights are a function of its scores."""
    return weigh(a @ b.mT * 0.1) @ x


def clamped_sum(s: Tensor) -> Tensor:
    e = torch.exp(s - s.max(-1, keepdim=True)[0].detach())
    return e / e.sum(-1, keepdim=True).clamp(min=1e-6)


def small_number(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / (e.sum(-1, keepdim=True) + 1e-9)


def clamped_where_it_matters(s: Tensor) -> Tensor:
    e = torch.exp(s)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-6)


def clamped_behind_a_mask(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True)) * torch.ones_like(s).tril(-1)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-6)


def number_beside(s: Tensor) -> Tensor:
    e = torch.exp(s)
    return e / (e.sum(-1, keepdim=True) + 0.25)


def quiet_above_zero(s: Tensor) -> Tensor:
    top = F.relu(s.amax(-1, keepdim=True))
    e = torch.exp(s - top)
    return e / (torch.exp(0 - top) + e.sum(-1, keepdim=True))


def sink_in_the_maximum(s: Tensor) -> Tensor:
    top = torch.maximum(s.amax(-1, keepdim=True), QUIET)
    e = torch.exp(s - top)
    return e / (e.sum(-1, keepdim=True) + torch.exp(QUIET - top))


def sink_in_the_logarithm(s: Tensor) -> Tensor:
    return torch.exp(s - torch.logaddexp(s.logsumexp(-1, keepdim=True), QUIET))


def shifted_key_by_key(s: Tensor) -> Tensor:
    """The further term is shifted differently for every key: no softmax."""
    shift = s[:, :1]
    e = torch.exp(s - shift)
    return e / (e.sum(-1, keepdim=True) + torch.exp(-shift))


def normalised_twice(s: Tensor) -> Tensor:
    p = F.dropout(s.softmax(-1), 0.1, False)
    return p / (p.sum(-1, keepdim=True) + 1e-9)


def masked_and_normalised(s: Tensor) -> Tensor:
    p = s.softmax(-1) * torch.ones_like(s).tril()
    return p / p.sum(-1, keepdim=True)


def masked_and_nearly_normalised(s: Tensor) -> Tensor:
    """What is left behind the mask may be as small as the number that is added to it."""
    p = s.softmax(-1) * torch.ones_like(s).tril()
    return p / (p.sum(-1, keepdim=True) + 1e-9)


def masked_part_read(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The share of the probabilities that is left is read, too."""
    p = (a @ b.mT * 0.1).softmax(-1) * torch.ones(x.shape[1], x.shape[1]).tril()
    left = p.sum(-1, keepdim=True)
    return (p / left) @ x + left


def less_than_the_largest(s: Tensor) -> Tensor:
    """Channel attention's turn of the scores, over tokens."""
    return (s.amax(-1, keepdim=True).expand_as(s) - s).softmax(-1)


def distances(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of queries and keys, the nearest heaviest."""
    d = a.pow(2).sum(-1, keepdim=True) - 2 * a @ b.mT + b.pow(2).sum(-1).unsqueeze(-2)
    return (-d * 0.05).softmax(-1) @ x


def turned_behind_a_mask(s: Tensor) -> Tensor:
    hidden_keys = torch.ones_like(s).triu(1).bool()
    return (1.0 - s.masked_fill(hidden_keys, -1e9)).softmax(-1)


def in_blocks(s_of: int, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Blocks of keys with a running maximum and sum: attention, but no sum over all keys at any place."""
    top, total, out = torch.full_like(a[..., :1], -torch.inf), torch.zeros_like(a[..., :1]), torch.zeros_like(x)
    for start in range(0, 2 * s_of, s_of):
        s = a @ b[:, start : start + s_of].mT * 0.1
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        p, kept = torch.exp(s - new), torch.exp(top - new)
        total, out, top = total * kept + p.sum(-1, keepdim=True), out * kept + p @ x[:, start : start + s_of], new
    return out / total


def hops(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A memory that is read twice, by products of elements and sums."""
    u = x.mean(1)
    for _ in range(2):
        p = torch.softmax((a * u.unsqueeze(1)).sum(-1) * 0.3, dim=1)
        u = u + (b * p.unsqueeze(-1)).sum(1)
    return u


def addressed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A memory addressed by cosines, sharpened."""
    p = F.softmax(4.0 * F.cosine_similarity(a, b.mean(1, keepdim=True), dim=-1), dim=1)
    return torch.matmul(p.unsqueeze(1), x).squeeze(1)


def sums_of_both(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Additive attention over a graph: a term of the query plus a term of the key."""
    return F.leaky_relu(a.mean(-1, keepdim=True) + b.mean(-1).unsqueeze(1), 0.2).softmax(-1) @ x


def per_channel(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Every channel has scores of its own: vector attention."""
    return (F.softmax(a.unsqueeze(2) * b.unsqueeze(1), 2) * x.unsqueeze(1)).sum(2)


class Neighbours(nn.Module):
    """Each pixel attends to the nine around it, laid out by unfold."""

    def __init__(self, sums: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.sums = sums

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q = self.q(x).view(b, 2, 4, h, w, 1)
        k, v = (
            f(F.pad(x, [1] * 4)).unfold(2, 3, 1).unfold(3, 3, 1).reshape(b, 2, 4, h, w, 9) for f in (self.k, self.v)
        )
        p = F.softmax((q * k).sum(2, keepdim=True), -1)
        if self.sums:
            return (p * v).sum(-1).view(b, c, h, w)
        return torch.einsum("bnchwk,bnchwk->bnchw", p.expand_as(v), v).view(b, c, h, w)


class Recommender(nn.Module):
    """Rows of padding are zeroed behind the softmax by the sign of their ids, an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(50, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        return ((x @ x.mT * 0.1).softmax(-1) * torch.sign(ids).unsqueeze(-1)) @ x


class _Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(WIDTH, WIDTH), 0.3

    def forward(self, x: Tensor) -> Tensor:
        s = self.scaled(self.inner(x) @ x.transpose(1, 2))
        if s.size(-1) > 1:
            s = s + 1
        return s.softmax(-1) @ x

    @torch.jit.export
    def scaled(self, s: Tensor) -> Tensor:
        return s * self.scale


class Compiled(nn.Module):
    """A submodule that TorchScript compiled, from its source or from a run."""

    def __init__(self, traced: bool) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        traced_from = torch.randn(2, 5, WIDTH)
        self.core: Any = torch.jit.trace(_Products(), traced_from) if traced else torch.jit.script(_Scripted())

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.before(x))


class _Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2) * 0.1, -1) @ x


def pixels(batch: int, time: int) -> tuple[Tensor]:
    """Images [B, C, T, 5]."""
    return (torch.randn(batch, 8, time, 5),)


def weighed(name: str, weigh: Callable[[Tensor], Tensor], dialects: tuple[str, ...] = DIALECTS, **words: Any) -> Case:
    sites = ({"heads": 1, "scale": 0.1} | words,)
    return Case(name, partial(Layer, partial(one_head, weigh)), hidden(), sites, dialects=dialects)


def refused(name: str, weigh: Callable[[Tensor], Tensor], reason: str) -> Case:
    return Case(name, partial(Layer, partial(one_head, weigh)), hidden(), (), (reason,))


def bodied(name: str, body: Any, sites: int, *reasons: str, **more: Any) -> Case:
    return Case(name, partial(Layer, body), hidden(), ({},) * sites, reasons, **more)


LIVE = ("export", "verified", "dynamo")
CASES = (
    weighed("sum clamped below one", clamped_sum),
    weighed("sum plus next to nothing", small_number),
    refused("sum clamped where it matters", clamped_where_it_matters, "clamped at 1e-06"),
    refused("masked sum clamped", clamped_behind_a_mask, "clamped at 1e-06"),
    weighed("sum plus a quarter", number_beside),
    weighed("quiet with a maximum above zero", quiet_above_zero),
    weighed("sink in the maximum", sink_in_the_maximum),
    weighed("sink in the logarithm", sink_in_the_logarithm, dialects=LIVE),
    refused("shifted key by key", shifted_key_by_key, ""),
    weighed("normalised twice", normalised_twice),
    weighed("masked, then normalised", masked_and_normalised, mask="causal"),
    refused("masked, then nearly normalised", masked_and_nearly_normalised, "multiplied by something else"),
    bodied("masked, normalised and the sum read", masked_part_read, 0, ""),
    weighed("less than the largest", less_than_the_largest, scale=-0.1),
    bodied("squared distances", distances, 1),
    refused("turned behind a mask", turned_behind_a_mask, "not positive"),
    bodied("a running maximum over blocks", partial(in_blocks, 5), 0, "exponentials of scores", "exponentials of scores",
           sizes=((2, 10), (3, 10))),
    bodied("two hops over a memory", hops, 2),
    bodied("addressed by cosines", addressed, 1, dialects=LIVE),
    bodied("queries plus keys", sums_of_both, 0, "additive"),
    bodied("a softmax per channel", per_channel, 0, "projection"),
    Case("pixels and their neighbours", partial(Neighbours, False), pixels, ({},), dialects=LIVE, quick=()),
    Case("pixels and their neighbours, by sums", partial(Neighbours, True), pixels, ({},)),
    Case("rows emptied by the sign of ids", Recommender, token_ids(), ({"heads": 1},)),
    Case("a scripted submodule", partial(Compiled, False), hidden(), ({},), dialects=("export", "verified")),
    Case("a traced submodule", partial(Compiled, True), hidden(), ({},), dialects=("export", "verified")),
)  # fmt: skip
