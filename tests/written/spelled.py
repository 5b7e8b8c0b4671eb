"""Unusual spellings of the softmax itself, of hiding keys, and of what is done to the probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden
from written.heads import Heads, causal, columns, raw, rows

HEADS, SIZE = 4, 8
SCALE = SIZE**-0.5
Tensor = torch.Tensor


def base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Powers of two of scores scaled by log2(e), as kernels write it."""
    scores = q @ k.mT * (SCALE * math.log2(math.e))
    p = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return p @ v / p.sum(-1, keepdim=True)


def base_two_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Powers of two divided before they weight values, without the factor: a softmax at temperature 1/ln 2."""
    p = torch.exp2(raw(q, k))
    return (p / p.sum(dim=-1, keepdim=True)) @ v


def power_of_e(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.pow(math.e, raw(q, k))
    return p / p.sum(-1, keepdim=True) @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores as [.., keys, queries] and a softmax over the axis before the last."""
    return torch.softmax(k @ q.mT * SCALE, dim=-2).transpose(-1, -2) @ v


def keys_first_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = F.softmax(torch.einsum("bhkd,bhqd->bkhq", k, q) / math.sqrt(SIZE), dim=1)
    return torch.einsum("bkhq,bhkd->bhqd", p, v)


def softmax_in_double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(raw(q, k), dim=-1, dtype=torch.float64).to(v.dtype) @ v


def half_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product in bfloat16, the softmax in float32."""
    scores = (q.bfloat16() @ k.bfloat16().mT).float() * SCALE
    return scores.softmax(-1).to(v.dtype) @ v


def filled_then_mended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-inf and a NaN guard, by a boolean `where` on both."""
    scores = raw(q, k)
    p = torch.where(causal(scores), scores, float("-inf")).softmax(-1)
    return torch.where(torch.isnan(p), torch.zeros_like(p), p) @ v


def nan_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = raw(q, k)
    p = scores.masked_fill(~causal(scores), -torch.inf).softmax(-1)
    return p.masked_fill(p != p, 0.0) @ v


def log_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The logarithm of a zero-one mask is added."""
    scores = raw(q, k)
    return (scores + causal(scores).to(scores.dtype).log()).softmax(-1) @ v


def log_mask_with_floor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a small number added before the logarithm: hidden keys keep a little, so it is a bias."""
    scores = raw(q, k)
    return (scores + torch.log(causal(scores).to(scores.dtype) + 1e-9)).softmax(-1) @ v


def minus_large(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """mask - (1 - mask)·1e10 on scores multiplied by the mask, as the first GPT had it."""
    scores = raw(q, k)
    seen = causal(scores).to(scores.dtype)
    return (scores * seen - 1e10 * (1 - seen)).softmax(-1) @ v


def minus_ten_thousand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a number that scores can reach."""
    scores = raw(q, k)
    seen = torch.ones_like(scores[:1, :1]).tril()
    return F.softmax(scores * seen + -1e4 * (1 - seen), dim=-1) @ v


def multiplied_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Hidden scores are zero, and their keys are seen."""
    scores = raw(q, k)
    return (scores * causal(scores)).softmax(-1) @ v


def lowered_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multiplied by one mask, lowered by another."""
    scores = raw(q, k)
    other = (rows(scores) - columns(scores) > -2).to(scores.dtype)
    return (scores * causal(scores) - 1e10 * (1 - other)).softmax(-1) @ v


def minus_thousand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask is subtracted as ten thousand times zero or one."""
    scores = raw(q, k)
    return (scores - 10000.0 * (~causal(scores)).to(scores.dtype)).softmax(-1) @ v


def shifted_by_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = raw(q, k)
    scores = scores - scores.max(dim=-1, keepdim=True)[0]
    scores = scores.masked_fill(~causal(scores), float("-inf"))
    e = torch.exp(scores)
    return torch.matmul(e / e.sum(dim=-1, keepdim=True), v)


def shifted_by_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The maximum of the whole tensor is subtracted."""
    scores = raw(q, k)
    e = torch.exp(scores - scores.max())
    return (e / e.sum(-1, keepdim=True)) @ v


def normalised_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum of the exponentials as a product with ones."""
    e = raw(q, k).exp()
    total = torch.einsum("bhij->bhi", e)
    return torch.einsum("bhij,bhjd->bhid", e, v) / total[..., None]


def normalised_by_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values with a column of ones: the last column of the result is the sum."""
    e = raw(q, k).exp()
    out = e @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return out[..., :-1] / out[..., -1:]


def l1_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.normalize of exponentials with p = 1 is their division by their sum, but for its epsilon."""
    return F.normalize(raw(q, k).exp(), p=1, dim=-1) @ v


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two halves of the heads' widths, one softmax each, subtracted as results."""
    q1, q2, k1, k2 = (*q.chunk(2, -1), *k.chunk(2, -1))
    one, two = (F.scaled_dot_product_attention(a, b, v, is_causal=True) for a, b in ((q1, k1), (q2, k2)))
    return one - 0.3 * two


def differential_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax over twice the heads, pairs of probabilities subtracted before they weight values."""
    b, h, t, d = q.shape
    q, k = (x.reshape(b, h, t, 2, d // 2).permute(0, 1, 3, 2, 4).reshape(b, 2 * h, t, d // 2) for x in (q, k))
    p = (q @ k.mT).softmax(-1).view(b, h, 2, t, t)
    return (p[:, :, 0] - 0.3 * p[:, :, 1]) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v) * torch.sigmoid(q)


def leaky(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Probabilities mixed with the uniform distribution over all keys."""
    p = raw(q, k).softmax(-1)
    return (0.9 * p + 0.1 / p.shape[-1]) @ v


def stretched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Probabilities stretched and clipped so that exact zeros and ones exist (clipped softmax)."""
    return torch.clamp(raw(q, k).softmax(-1) * 1.06 - 0.03, 0, 1) @ v


def forgetting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sums of log forget gates between key and query are a bias (forgetting transformer)."""
    gates = F.logsigmoid(q.mean(-1)).cumsum(-1)
    scores = raw(q, k) + (gates[..., :, None] - gates[..., None, :])
    return scores.masked_fill(~causal(scores), float("-inf")).softmax(-1) @ v


def by_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores scaled by the logarithm of the position (scalable softmax)."""
    t = q.shape[-2]
    scale = torch.log(torch.arange(1, t + 1, device=q.device, dtype=q.dtype) + 1)[:, None]
    scores = (q * scale) @ k.mT * SCALE
    return scores.masked_fill(~causal(scores), -torch.inf).softmax(-1) @ v


def scale_of_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """log(length) / sqrt(d) as a Python number of a symbolic size."""
    scores = q @ k.mT * (math.log(k.shape[-2] + 1) / math.sqrt(SIZE))
    return scores.softmax(-1) @ v


def sinkhorn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows and columns normalised in turn."""
    logs = raw(q, k)
    for _ in range(2):
        logs = logs - logs.logsumexp(-1, keepdim=True)
        logs = logs - logs.logsumexp(-2, keepdim=True)
    return logs.exp() @ v


def gumbel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The hard choice of the best key with the soft one's gradient."""
    soft = raw(q, k).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return (hard - soft.detach() + soft) @ v


def slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over queries, then a mean over keys."""
    p = torch.softmax(raw(q, k), dim=-2) + 1e-8
    return (p / p.sum(dim=-1, keepdim=True)) @ v


def halted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Probabilities cut under a threshold that depends on the row, and normalised again."""
    p = raw(q, k).softmax(-1)
    p = p * (p > p.mean(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True) @ v


def products_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The products written as a broadcast multiplication and a sum."""
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * SCALE
    return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def scores_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the scores written so."""
    return (q[..., :, None, :] * k[..., None, :, :]).sum(-1).mul(SCALE).softmax(-1) @ v


def by_inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.einsum with sublists and torch.tensordot have no batch; bmm on merged axes with torch.bmm(out) has."""
    b, h, t, d = q.shape
    q, k, v = (x.reshape(-1, t, d) for x in (q, k, v))
    scores = torch.empty(b * h, t, t, dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(dim=-1), v).view(b, h, t, d)


def viewed_like_its_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads merged with the batch for the product, and the scores viewed as the mask is."""
    mask = torch.ones(*q.shape[:3], q.shape[2]).tril()
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view_as(mask) * SCALE
    return (scores.masked_fill(mask == 0, -torch.inf).softmax(-1) @ v).view_as(v)


def two_memories(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax over the keys of two products, whose probabilities weight values apart."""
    t = k.shape[-2]
    p = torch.cat([raw(q, k), raw(q, k * 0.5)], -1).softmax(-1)
    return p[..., :t] @ v + p[..., t:] @ (v * 2)


def chunk_by_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores written into a buffer, the first two rows and the others."""
    t = q.shape[-2]
    scores = q.new_zeros(*q.shape[:2], t, t)
    scores[:, :, :2] = raw(q[:, :, :2], k)
    scores[:, :, 2:] = raw(q[:, :, 2:], k)
    return scores.softmax(-1) @ v


def mask_doubled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two additive masks of the least number, whose sum is -inf where both hide, clamped back."""
    scores = raw(q, k)
    lowest = torch.finfo(scores.dtype).min
    one = torch.zeros_like(scores[0, 0]).masked_fill(~causal(scores), lowest)
    two = torch.zeros_like(scores[0, 0]).masked_fill(rows(scores) - columns(scores) > 4, lowest)
    return torch.max(scores + (one + two), torch.tensor(lowest)).softmax(-1) @ v


def mask_by_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Hidden scores written through the indices of a triangle."""
    scores = raw(q, k)
    scores[..., ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()] = float("-inf")
    return scores.softmax(-1) @ v


def normalised_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores of a row are standardised first: no softmax of a product any more."""
    return F.layer_norm(raw(q, k), (q.shape[-2],)).softmax(-1) @ v


class Temperature(nn.Module):
    """A learned temperature, clamped and squeezed out of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / self.log_temperature.exp().clamp(min=1e-2)).softmax(-1) @ v


class DropKey(nn.Module):
    """Dropout of keys before the softmax, which is off outside training."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = raw(q, k)
        if self.training:
            scores = scores + torch.bernoulli(torch.full_like(scores, 0.1)) * -1e12
        return F.dropout(scores.softmax(-1), 0.1, self.training) @ v


class TalkingMatrix(nn.Module):
    """Scores mixed between heads by a matrix before the softmax, probabilities after it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.eye(HEADS) + 0.1 * torch.randn(HEADS, HEADS)) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("hg,bhij->bgij", self.before, raw(q, k))
        return torch.einsum("hg,bhij->bgij", self.after, scores.softmax(-1)) @ v


def one(name: str, core: Any, refused: tuple[str, ...] = (), **words: Any) -> Case:
    found = () if refused else ({"heads": HEADS, "head_dim": SIZE, **words},)
    make: Callable[[], Any] = core if isinstance(core, type) else lambda: core
    return Case(name, lambda: Heads(make()), hidden(), found, refused)


CASES = (
    one("powers of two", base_two, scale=SCALE),
    one("powers of two, divided first", base_two_softmax, scale=SCALE * math.log(2)),
    one("powers of e", power_of_e, scale=SCALE),
    one("keys first", keys_first, scale=SCALE),
    one("keys first by einsum", keys_first_einsum, scale=SCALE),
    one("softmax in double", softmax_in_double, scale=SCALE),
    one("scores in half precision", half_scores, scale=SCALE),
    one("filled, then mended", filled_then_mended, mask="causal"),
    one("filled, NaN found by itself", nan_filled, mask="causal"),
    one("logarithm of a mask", log_mask, mask="causal"),
    one("logarithm of a mask and a floor", log_mask_with_floor, mask="full", biases=1),
    one("multiplied and lowered", minus_large, mask="causal", empty_rows="mean"),
    one("multiplied and lowered by ten thousand", minus_ten_thousand, ("filled with -10000.0",)),
    one("multiplied only", multiplied_only, ("multiplied by zero",)),
    one("multiplied by one mask, lowered by another", lowered_elsewhere, ("multiplied by zero",)),
    one("lowered by ten thousand", minus_thousand, mask="full", biases=1),
    one("maximum, then mask, then exponentials", shifted_by_maximum, mask="causal"),
    one("maximum of everything", shifted_by_all, scale=SCALE),
    one("sum by einsum", normalised_by_einsum, scale=SCALE),
    one("sum as a column of the result", normalised_by_ones, ("",)),
    one("exponentials normalised", l1_normalised, ("",)),
    Case("differential by results", lambda: Heads(differential), hidden(), ({"heads": 4, "head_dim": 4, "value_dim": 8, "mask": "causal"},) * 2),
    one("differential by pairs of heads", differential_pairs, ("",)),
    one("gated by the query", gated, mask="full"),
    one("mixed with the uniform", leaky, ("",)),
    one("clipped", stretched, ("",)),
    one("forget gates", forgetting, mask="causal", biases=1),
    one("scaled by the position", by_length, mask="causal"),
    one("scaled by the length", scale_of_length, mask="full"),
    one("rows and columns in turn", sinkhorn, ("",)),
    one("straight through", gumbel, ("",)),
    one("softmax over queries, mean over keys", slots, ("",)),
    one("cut under the mean", halted, ("",)),
    one("products as sums", products_summed, scale=SCALE),
    one("scores as sums", scores_summed, scale=SCALE),
    one("baddbmm without a bias", by_inner, scale=SCALE),
    one("two low masks, clamped", mask_doubled, scale=SCALE),
    one("written through indices", mask_by_index, mask="causal"),
    one("viewed like its mask", viewed_like_its_mask, mask="causal"),
    one("two memories", two_memories, ("two products under one softmax",)),
    one("chunk by chunk", chunk_by_chunk, ("",)),
    one("scores standardised", normalised_scores, ("",)),
    one("learned temperature", Temperature, gain=True),
    one("keys dropped in training", DropKey, scale=SCALE),
    one("talking matrices", TalkingMatrix, ("mixed by a weight",)),
)  # fmt: skip
