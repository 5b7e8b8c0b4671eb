"""Softmaxes, exponentials and products that look like attention and are none."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden, token_ids

WIDTH = 32


class Layer(nn.Module):
    """Two projections and a function of x and both."""

    def __init__(self, body: Any, first: int = WIDTH, second: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Linear(WIDTH, first), nn.Linear(WIDTH, second), body

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        return self.body(x, self.a(x), self.b(x), *rest)


def router(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two of four experts, weights normalised again."""
    weight, chosen = torch.topk(torch.softmax(a, -1), 2, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    return (
        torch.gather(b.unflatten(-1, (4, 8)), 2, chosen[..., None].expand(-1, -1, -1, 8)).mul(weight[..., None]).sum(2)
    )


def soft_experts(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Tokens are dispatched to slots by a softmax over tokens and combined by one over slots."""
    dispatch, combine = torch.softmax(a, 1), torch.softmax(a, 2)
    slots = torch.einsum("bts,btd->bsd", dispatch, x)
    return torch.einsum("bts,bsd->btd", combine, torch.tanh(slots))


def softmaxes_mixed(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Several softmaxes of a vocabulary, mixed by a prior."""
    return (torch.softmax(a, -1).unsqueeze(-1) * torch.softmax(b.unflatten(-1, (4, 8)), -1)).sum(2).log()


def routed_capsules(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Routing by agreement: coupling weights are a softmax over capsules of logits that agreement updates."""
    votes = a.unflatten(-1, (4, 8))
    logits = torch.zeros(votes.shape[:-1])
    for _ in range(2):
        coupling = torch.softmax(logits, -1)
        s = (coupling.unsqueeze(-1) * votes).sum(1, keepdim=True)
        logits = logits + (votes * F.normalize(s, dim=-1)).sum(-1)
    return s.squeeze(1)


def gumbel(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A relaxed choice among code words, with the noise given by the second projection."""
    noise = -torch.log(-torch.log(torch.sigmoid(b)))
    return torch.softmax((a + noise) / 0.7, -1) @ torch.eye(WIDTH)


def code_book(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A soft choice of a weight's rows: a mixture of fixed vectors."""
    return torch.softmax(a, -1) @ torch.linspace(-1, 1, WIDTH * 6).view(WIDTH, 6)


def cross_entropy(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(a.flatten(0, 1), b.flatten(0, 1).argmax(-1), label_smoothing=0.1)


def smoothed_by_hand(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    logs = a.log_softmax(-1)
    hit = -logs.gather(-1, b.argmax(-1, keepdim=True)).squeeze(-1)
    return (0.9 * hit - 0.1 * logs.mean(-1)).mean()


def divergence(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")


def contrast(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Every row of one side against every row of the other, and a loss: a product of activations, but no values."""
    a, b = F.normalize(a.mean(1), dim=-1), F.normalize(b.mean(1), dim=-1)
    logits = a @ b.T * math.exp(2.0)
    return (torch.logsumexp(logits, 1) - logits.diagonal()).mean()


def contrast_probabilities(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same product, its probabilities returned."""
    return torch.softmax(a @ b.mT, -1)


def matched(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two softmaxes of one product, multiplied: mutual matches."""
    s = a @ b.mT
    return s.softmax(-1) * s.softmax(-2)


def log_odds(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Log-probabilities per step, time first, as connectionist temporal classification takes them."""
    return F.log_softmax(a, -1).transpose(0, 1).contiguous()


def gated(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.softmax(a, -1) * b


def over_time(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A weighted mean of values over time, weights from a projection."""
    return (torch.softmax(a, 1) * b).sum(1)


def depth_mixing(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Layers weighted by a softmax of learned numbers."""
    weights = torch.softmax(torch.linspace(0, 1, 3), 0)
    return torch.einsum("l,lbtd->btd", weights, torch.stack([x, a, b]))


def decayed(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A recurrence in product form: scores under a decay, no softmax."""
    t = x.shape[1]
    at = torch.arange(t)
    decay = torch.where(at[:, None] >= at[None], 0.9 ** (at[:, None] - at[None]).clamp(min=0).float(), 0.0)
    return (a @ b.mT * decay) @ x


def kernel_weights(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A Gaussian kernel of distances, normalised: its logits are distances, not products."""
    return torch.softmax(-torch.cdist(a, b).square(), -1) @ x


def sums_to_mean(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Scores divided by their sum, without exponentials."""
    s = (a @ b.mT).relu()
    return s / (s.sum(-1, keepdim=True) + 1e-6) @ x


def exponential_alone(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """exp without a sum."""
    return torch.exp(a @ b.mT * 0.01) @ x


def other_sum(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exponentials of the masked over the sum of all."""
    s = a @ b.mT * 0.1
    t = s.shape[-1]
    seen = torch.ones(t, t, dtype=torch.bool).tril()
    return s.exp().masked_fill(~seen, 0.0) / s.exp().sum(-1, keepdim=True) @ x


def causal_sum(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exponentials masked before both: a causal attention."""
    e = (a @ b.mT * 0.1).exp() * torch.ones(x.shape[1], x.shape[1]).tril()
    return e / e.sum(-1, keepdim=True) @ x


def queries_summed(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exponentials divided by the sum over queries."""
    e = (a @ b.mT * 0.1).exp()
    return e / e.sum(-2, keepdim=True) @ x


def slots(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Slot attention: softmax over slots, then normalised over inputs."""
    weights = torch.softmax(b[:, :4] @ a.mT * WIDTH**-0.5, dim=1) + 1e-8
    return weights / weights.sum(-1, keepdim=True) @ x


def entmax_like(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Softmax scores squared and normalised again."""
    p = torch.softmax(a @ b.mT * 0.1, -1).square()
    return p / p.sum(-1, keepdim=True) @ x


def rescored(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product is taken again with the probabilities' softmax: two softmaxes in a row."""
    return torch.softmax(torch.softmax(a @ b.mT * 0.1, -1), -1) @ x


def kept_top(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(a @ b.mT * 0.1, -1)
    return torch.where(p > 0.05, p, 0.0) @ x


def hardened(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(a @ b.mT * 0.1, -1)
    return F.one_hot(p.argmax(-1), p.shape[-1]).to(x.dtype) @ x


def residual_probabilities(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Probabilities plus the identity weight the values."""
    p = torch.softmax(a @ b.mT * 0.1, -1)
    return (p + torch.eye(x.shape[1])) @ x


def weighted_by_values(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The values depend on the probabilities."""
    p = torch.softmax(a @ b.mT * 0.1, -1)
    return p @ (x * p.sum(1).unsqueeze(-1))


def mutated_scores(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The scores are overwritten after they were read for another output."""
    s = a @ b.mT * 0.1
    before = s.sum(-1, keepdim=True).clone()
    s[:, :, 0] = -torch.inf
    return torch.softmax(s, -1) @ x + before


class ClassLogits(nn.Module):
    """A language model's head with a tied embedding: a softmax over the vocabulary, then an expected embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(50, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok(ids)
        return torch.softmax(x @ self.tok.weight.T, -1) @ self.tok.weight


def none(name: str, body: Any, *refused: str, first: int = WIDTH, second: int = WIDTH) -> Case:
    return Case(name, partial(Layer, body, first, second), hidden(), (), refused or ("no softmax",))


CASES = (
    none("router", router, "projection", first=4),
    none("soft experts", soft_experts, "projection", "projection", first=6),
    none("mixture of softmaxes", softmaxes_mixed, "", "", first=4),
    none("routing by agreement", routed_capsules, "", ""),
    none("gumbel", gumbel, ""),
    none("code book", code_book, "projection"),
    none("cross entropy", cross_entropy),
    none("label smoothing by hand", smoothed_by_hand),
    none("divergence", divergence, "projection"),
    none("contrast", contrast),
    none("probabilities returned", contrast_probabilities, "returned"),
    none("mutual matches", matched, "", ""),
    none("log-probabilities", log_odds),
    none("softmax as a gate", gated, "projection"),
    none("weighted mean over time", over_time, "projection"),
    none("layers mixed", depth_mixing, ""),
    none("decay without softmax", decayed),
    none("kernel of distances", kernel_weights, ""),
    none("scores over their sum", sums_to_mean),
    none("exponentials alone", exponential_alone),
    none("exponentials over another sum", other_sum, ""),
    none("exponentials over the sum of queries", queries_summed, ""),
    none("slots", slots, ""),
    none("probabilities squared", entmax_like, ""),
    none("two softmaxes in a row", rescored, "", ""),
    none("small probabilities dropped", kept_top, ""),
    Case("hardened", partial(Layer, hardened), hidden(), (), ("",), ("export", "verified", "dynamo")),
    none("probabilities plus identity", residual_probabilities, ""),
    none("values from probabilities", weighted_by_values, ""),
    Case("exponentials masked before both", partial(Layer, causal_sum), hidden(), ({"heads": 1, "scale": 0.1, "mask": "causal"},)),
    Case("scores overwritten", partial(Layer, mutated_scores), hidden(), (), ("",)),
    Case("expected embedding", ClassLogits, token_ids(), (), ("projection",)),
)  # fmt: skip
