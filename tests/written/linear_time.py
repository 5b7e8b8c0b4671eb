"""Mixers of tokens without a softmax over keys: kernels, decays, recurrences, channels; and softmaxes of other things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden
from written.heads import Heads, causal, raw

Tensor = torch.Tensor


def random_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positive random features of the softmax kernel (Performer): exponentials, a maximum and a sum, and no scores."""
    w = torch.linspace(-1, 1, 8 * 12, device=q.device, dtype=q.dtype).view(8, 12)

    def features(x: Tensor, over: tuple[int, ...]) -> Tensor:
        y = x * 8**-0.25
        logits = y @ w
        return torch.exp(logits - y.square().sum(-1, keepdim=True) / 2 - logits.amax(over, keepdim=True)) + 1e-4

    a, b = features(q, (-1,)), features(k, (-1, -2))
    return a @ (b.mT @ v) / (a @ b.sum(-2).unsqueeze(-1))


def positive_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ(q)·φ(k) over its sum, quadratic form, causal."""
    s = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    s = s.masked_fill(~causal(s), 0.0)
    return s / s.sum(-1, keepdim=True) @ v


def softmaxes_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries normalised over features, keys over time (efficient attention): softmaxes of projections."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def retained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores under a decay per head, normalised by their absolute sum (retention)."""
    at = torch.arange(q.shape[-2], device=q.device)
    distance = (at[:, None] - at).to(q.dtype)
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[1], device=q.device, dtype=q.dtype))
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
    s = q @ k.mT * decay
    return s / s.abs().sum(-1, keepdim=True).clamp(min=1) @ v


def attention_free(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(w[i, j] + k[j]) over its sum, per feature, gated by the query (AFT): a product of a table with activations."""
    at = torch.arange(q.shape[-2], device=q.device, dtype=q.dtype)
    w = torch.exp(-(at[:, None] - at).abs() * 0.1)
    weight = torch.exp(k - k.amax(-2, keepdim=True))
    return torch.sigmoid(q) * (w @ (weight * v)) / (w @ weight)


def weighted_key_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A running weighted mean with exponential decay (RWKV), by cumulative sums."""
    weight = torch.exp(k - k.amax(-2, keepdim=True))
    return torch.sigmoid(q) * (weight * v).cumsum(-2) / weight.cumsum(-2)


def states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention as a cumulative sum of outer products."""
    state = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=2)
    return torch.einsum("bhtk,bhtkv->bhtv", q.softmax(-1), state)


def cross_covariance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Features attend to features (XCiT): a softmax over the width, tokens summed out."""
    q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return ((q @ k.transpose(-2, -1) * 1.5).softmax(-1) @ v).transpose(-2, -1)


def clustered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Soft assignment of tokens to four learned centres and back (a softmax of a product with constants)."""
    centres = torch.linspace(-1, 1, 32, device=q.device, dtype=q.dtype).view(4, 8)
    share = torch.softmax(q @ centres.T, -1)
    return share @ (share.mT @ v)


def distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax of minus squared distances, expanded into a product and two norms."""
    d = q.square().sum(-1, keepdim=True) - 2 * q @ k.mT + k.square().sum(-1).unsqueeze(-2)
    return torch.softmax(-d / 8**0.5, -1) @ v


def hopfield(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two steps of retrieval: the first result asks again."""
    for _ in range(2):
        q = torch.softmax(raw(q, k), -1) @ k
    return q


class Additive(nn.Module):
    """Softmaxes of a projected number per token pool queries, then keys (Fastformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked = (torch.softmax(self.a(q) * 8**-0.5, -2) * q).sum(-2, keepdim=True)
        mixed = k * asked
        pooled = (torch.softmax(self.b(mixed) * 8**-0.5, -2) * mixed).sum(-2, keepdim=True)
        return pooled * v + q


class Synthesised(nn.Module):
    """Attention weights from a network of the token alone (Synthesizer), up to twenty tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 20))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.net(q)[..., : q.shape[-2]]
        return scores.masked_fill(~causal(scores), float("-inf")).softmax(-1) @ v


class Edges(nn.Module):
    """Softmax over the edges that enter each node, by scatter: a graph as a list of edges."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        score = (self.q(x)[target] * self.k(x)[source]).sum(-1) * 32**-0.5
        top = torch.full((x.shape[0],), float("-inf")).scatter_reduce(0, target, score, "amax")
        e = torch.exp(score - top[target])
        p = e / torch.zeros(x.shape[0]).index_add(0, target, e)[target]
        return torch.zeros_like(x).index_add(0, target, p[:, None] * self.v(x)[source])


class Conditioned(nn.Module):
    """Log-probabilities of a chain: forward recursion with logsumexp over states (CRF)."""

    def __init__(self) -> None:
        super().__init__()
        self.emit, self.moves = nn.Linear(32, 5), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        emission = self.emit(x)
        alpha = emission[:, 0]
        for step in range(1, 4):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + self.moves, dim=1) + emission[:, step]
        return alpha.logsumexp(1)


class Experts(nn.Module):
    """Tokens routed by a softmax of products with expert embeddings that are computed, and experts as a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.w = nn.Linear(32, 4), nn.Parameter(torch.randn(4, 32, 32) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        share = F.softmax(self.gate(x), dim=-1)
        share = share * (share >= share.topk(2, -1).values[..., -1:])
        share = share / share.sum(-1, keepdim=True)
        return torch.einsum("bte,btd,edf->btf", share, x, self.w)


class ConvolvedFeatures(nn.Module):
    """A picture's features by one convolution, a softmax on queries over features and on keys over places."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(32, 96, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.flatten(2).unflatten(1, (4, 8)) for y in self.qkv(x).chunk(3, 1))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        return torch.einsum("bhde,bhdn->bhen", context, q.softmax(-2)).flatten(1, 2).view_as(x)


class Pointer(nn.Module):
    """Scores of one query as the output: a distribution over inputs, and no values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.q(x[:, -1:]) @ self.k(x).mT, -1).squeeze(1)


class Copying(nn.Module):
    """Attention probabilities scattered on a vocabulary (a copy mechanism)."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.q, self.k = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        p = torch.softmax(self.q(x) @ self.k(x).mT, -1)
        return torch.zeros(*ids.shape, 20).scatter_add(-1, ids[:, None].expand_as(p), p)


def edges(_: int, nodes: int) -> tuple[Tensor, ...]:
    return torch.randn(nodes, 32), torch.randint(0, nodes, (2, nodes * 3))


def picture(batch: int, _: int) -> tuple[Tensor]:
    return (torch.randn(batch, 32, 4, 6),)


def core(name: str, function: Any, *refused: str, found: tuple[dict[str, Any], ...] = ()) -> Case:
    make: Callable[[], Any] = function if isinstance(function, type) else lambda: function
    return Case(name, lambda: Heads(make()), hidden(), found, refused or (() if found else ("no softmax",)))


def ids(batch: int, time: int) -> tuple[Tensor]:
    return (torch.randint(0, 20, (batch, time)),)


CASES = (
    core("positive random features", random_features),
    core("positive parts over their sum", positive_parts),
    core("softmaxes on queries and on keys", softmaxes_on_both, "projection", "projection"),
    core("retained", retained),
    core("free of attention", attention_free),
    core("weighted keys and values", weighted_key_values),
    core("sums of outer products", states, "projection"),
    core("features attend to features", cross_covariance, ""),
    core("clusters", clustered, ""),
    core("distances", distances, ""),
    core("retrieval in two steps", hopfield, found=({"heads": 4, "head_dim": 8},) * 2),
    core("pooled queries and keys", Additive, "projection", ""),
    core("weights from a network", Synthesised, "projection"),
    Case("convolved features", ConvolvedFeatures, picture, (), ("projection", "projection")),
    Case("softmax over edges", Edges, edges, (), ("no softmax",)),
    Case("chain of states", Conditioned, hidden(), (), ("no softmax",)),
    Case("mixture of experts", Experts, hidden(), (), ("projection",)),
    Case("pointer", Pointer, hidden(), (), ("no softmax",)),
    Case("copying", Copying, ids, (), ("",)),
)
