"""Attention with one step too many: what looks like it and must be refused, and what still is."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from written.around_scores import LOWEST, case
from written.case import Case, hidden
from written.heads import Heads, causal, columns, raw


def query_axis_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(raw(q, k), dim=-2) @ v


def transposed_back(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(raw(q, k), -1).mT @ v


def per_key_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    return torch.softmax(scores * torch.log(columns(scores) + 2.0), -1) @ v


def masked_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    return torch.softmax(scores, -1).masked_fill(~causal(scores), 0.0) @ v


def multiplied_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    return (torch.softmax(scores, -1) * causal(scores)) @ v


def used_twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(raw(q, k), -1)
    return p @ v + p @ k


def entropy_added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(raw(q, k), -1)
    return p @ v + (p * p.clamp_min(1e-9).log()).sum(-1, keepdim=True)


def both_axes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    return scores.flatten(2).softmax(-1).view_as(scores) @ v


def sigmoid(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(raw(q, k)) @ v


def squared_relu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return raw(q, k).relu().square() @ v


def talking(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mix = torch.linspace(-1, 1, 16).view(4, 4)
    p = torch.softmax(torch.einsum("bhqk,hg->bgqk", raw(q, k), mix), -1)
    return p @ v


def talking_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mix = torch.linspace(-1, 1, 16).view(4, 4)
    return torch.einsum("bhqk,hg->bgqk", torch.softmax(raw(q, k), -1), mix) @ v


def top_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    kept = scores.topk(3, -1).values[..., -1:]
    return torch.softmax(scores.masked_fill(scores < kept, LOWEST), -1) @ v


def from_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    return torch.softmax(scores + scores.mean(-1, keepdim=True) * scores, -1) @ v


def squared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(raw(q, k).square(), -1) @ v


def clamped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(raw(q, k).clamp(-5, 5), -1) @ v


def differential(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return (torch.softmax(q1 @ k1.mT * 0.5, -1) - 0.3 * torch.softmax(q2 @ k2.mT * 0.5, -1)) @ v


def differential_outputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return F.scaled_dot_product_attention(q1, k1, v) - 0.3 * F.scaled_dot_product_attention(q2, k2, v)


def mixture_of_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    p = 0.5 * torch.softmax(raw(q, k), -1) + 0.5 * torch.softmax(raw(q * 2, k), -1)
    return p @ v


def feature_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def elu_plus_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))


def channel_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.softmax(q.mT @ k, -1) @ v.mT).mT


FREE_LENGTH = ("export", "verified", "core")
"""Without Dynamo, which fixes the length first: then it is the head size, and channels attend."""

CASES = (
    case("softmax over queries", query_axis_softmax, ("",)),
    case("probabilities transposed", transposed_back, ("",)),
    case("a factor per key", per_key_scale, ("from key to key",)),
    case("masked after the softmax", masked_after, ("after the softmax",)),
    case("multiplied by a mask after the softmax", multiplied_after, ("",)),
    case("probabilities weight two values", used_twice, ("other uses",)),
    case("probabilities also in an entropy", entropy_added, ("other uses",)),
    case("softmax over queries and keys", both_axes, ("several axes",)),
    Case("sigmoid", partial(Heads, sigmoid), hidden(), (), ("no softmax",)),
    Case("squared relu", partial(Heads, squared_relu), hidden(), (), ("no softmax",)),
    case("talking heads before", talking, ("",)),
    case("talking heads after", talking_after, ("",)),
    case("top keys", top_keys, ("computed from",)),
    case("scores times their mean", from_scores, ("computed from",)),
    case("squared scores", squared, ("",)),
    case("clamped scores", clamped, ("clamped",)),
    Case("differential", partial(Heads, differential), hidden(), (), ("", "")),
    Case("differential by outputs", partial(Heads, differential_outputs), hidden(), ({"heads": 4},) * 2),
    Case("mixture of softmaxes", partial(Heads, mixture_of_softmax), hidden(), (), ("", "")),
    Case("softmax over features and over time", partial(Heads, feature_softmax), hidden(), (), ("projection", "projection")),
    Case("elu plus one", partial(Heads, elu_plus_one), hidden(), (), ("no softmax",)),
    Case("attention over channels", partial(Heads, channel_attention), hidden(), (), ("fixed number",), FREE_LENGTH),
)  # fmt: skip
