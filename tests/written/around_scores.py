"""What may stand between the product of queries and keys and its softmax: one line each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden
from written.heads import Core, Heads, causal, columns, raw, rows

SCALE = 8**-0.5
LOWEST = torch.finfo(torch.float32).min
Change = Callable[[torch.Tensor], torch.Tensor]


class Changed(nn.Module):
    """Softmax attention whose scaled scores go through a given change first."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.change(raw(q, k)), dim=-1) @ v


def case(name: str, core: Core, refused: tuple[str, ...] = (), **words: Any) -> Case:
    """A core that is a function of q, k and v."""
    return made(name, lambda: core, refused, **words)


def made(name: str, make: Callable[[], Core], refused: tuple[str, ...] = (), **words: Any) -> Case:
    """A core that has parameters or a mode of its own, made with each model."""
    found = () if refused else ({"heads": 4, "head_dim": 8, **words},)
    return Case(name, lambda: Heads(make()), hidden(), found, refused)


def changed(name: str, change: Change, refused: tuple[str, ...] = (), **words: Any) -> Case:
    """A function of the scaled scores before the softmax."""
    return made(name, lambda: Changed(change), refused, **({"scale": SCALE} | words))


def biased(name: str, change: Callable[[], nn.Module], **words: Any) -> Case:
    """The same with parameters."""
    return made(name, lambda: Changed(change()), scale=SCALE, **words)


def on_q(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax((q * q.size(-1) ** -0.5).matmul(k.mT), -1).matmul(v)


def on_k(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q.matmul((k / math.sqrt(k.size(-1))).mT), -1).matmul(v)


def on_both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    root = q.size(-1) ** -0.25
    return torch.softmax((q * root) @ (k * root).transpose(2, 3), -1) @ v


def on_transposed_key(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ (k.transpose(-1, -2) * 0.5), -1) @ v


def after_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    scores /= math.sqrt(q.size(-1))
    return F.softmax(scores, dim=3).matmul(v)


def in_place_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.mT)
    scores.mul_(0.125).add_(torch.full(scores.shape[-2:], float("-inf")).triu_(1))
    return scores.softmax(-1).matmul(v)


def in_place_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    scores.masked_fill_(~causal(scores), -torch.inf)
    return torch.softmax(scores, -1) @ v


def scale_tensor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT / torch.sqrt(torch.tensor(8.0)), -1) @ v


def unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT).softmax(-1) @ v


def upcast_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.softmax(raw(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def upcast_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (raw(q.float(), k.float()).softmax(-1) @ v.float()).type_as(q)


def stabilised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    e = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return (e / e.sum(-1, keepdim=True)) @ v


def stabilised_amax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k).masked_fill(~causal(raw(q, k)), LOWEST)
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return e.div(e.sum(dim=-1, keepdim=True)).matmul(v)


def bare_exponentials(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = raw(q, k).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def divided_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = raw(q, k).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def reciprocal_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = raw(q, k).exp()
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


def log_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(raw(q, k), -1).exp() @ v


def minus_logsumexp(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def plus_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = raw(q, k).exp()
    return e / (1 + e.sum(-1, keepdim=True)) @ v


def plus_one_stabilised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    top = scores.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(scores - top)
    return e / (torch.exp(-top) + e.sum(-1, keepdim=True)) @ v


def plus_one_padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.softmax(F.pad(raw(q, k), (0, 1)), -1)[..., :-1] @ v


def keys_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(raw(k, q), dim=-2).mT @ v


def values_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (v.mT @ torch.softmax(raw(q, k), -1).mT).mT


class Sinks(nn.Module):
    """A learned logit per head beside the keys."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.sink, self.first = nn.Parameter(torch.randn(4)), first

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = raw(q, k)
        column = self.sink.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        if self.first:
            return torch.softmax(torch.cat([column, scores], -1), -1)[..., 1:] @ v
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v


def row_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A logit beside the keys that each query computes for itself."""
    scores = raw(q, k).masked_fill(columns(q @ k.mT) > rows(q @ k.mT), LOWEST)
    column = torch.sin(3 * q).mean(-1, keepdim=True)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v


def in_padded_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention inside blocks of four, of a length that is padded to a whole number of them."""
    length = q.shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, -length % 4)).unflatten(2, (-1, 4)).transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(raw(q, k), -1) @ v).transpose(1, 2).flatten(2, 3)[:, :, :length]


def upcast_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Heads picked by a list of one index and repeated; keys are cast to the type that they have."""
    k, v = (x[:, [-1]].expand(-1, 4, -1, -1) for x in (k, v))
    return torch.softmax(raw(q.float(), k.float()), -1) @ v


class Temperature(nn.Module):
    """Scores times a learned number per head."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.tau, self.where = nn.Parameter(torch.rand(4, 1, 1) + 0.5), where

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.where == "q":
            return torch.softmax((q * self.tau) @ k.mT, -1) @ v
        if self.where == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            return torch.softmax(q @ k.mT * self.tau.clamp(max=math.log(100)).exp(), -1) @ v
        return torch.softmax(q @ k.mT / self.tau, -1) @ v


class QueryNorm(nn.Module):
    """q and k through a norm over the head size."""

    def __init__(self) -> None:
        super().__init__()
        self.nq, self.nk = nn.RMSNorm(8), nn.LayerNorm(8)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(raw(self.nq(q), self.nk(k)), -1) @ v


def per_query_temperature(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    return torch.softmax(scores * torch.log(rows(scores) + 2.0), -1) @ v


def guarded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    seen = columns(scores) < rows(scores)
    return torch.nan_to_num(torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)) @ v


def refilled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    hidden_keys = ~(columns(scores) < rows(scores))
    p = torch.softmax(scores.masked_fill(hidden_keys, LOWEST), -1)
    return p.masked_fill(hidden_keys, 0.0) @ v


def multiplied_after_twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = raw(q, k)
    seen = causal(scores)
    return (torch.softmax(scores.masked_fill(~seen, LOWEST), -1) * seen) @ v


def sparse_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(raw(q, k), -1) @ (v * 2 + 1) * 3


def hard(scores: torch.Tensor) -> torch.Tensor:
    return torch.where(causal(scores), 0.0, float("-inf"))


def alibi(scores: torch.Tensor) -> torch.Tensor:
    slopes = 2.0 ** (-2.0 * torch.arange(1, 5))
    return (columns(scores) - rows(scores)) * slopes[:, None, None]


def alibi_symmetric(scores: torch.Tensor) -> torch.Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1)
    return -slopes * (columns(scores) - rows(scores)).abs()


class RelativeTable(nn.Module):
    """A bias read from a table by the distance of key and query, clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 4)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        distance = (columns(scores) - rows(scores)).clamp(-8, 8) + 8
        return scores + self.table(distance).permute(2, 0, 1)


class Buckets(nn.Module):
    """A bias read from a table by the distance in buckets that grow with the logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        distance = (rows(scores) - columns(scores)).clamp(min=0)
        far = 8 + (torch.log(distance.float().clamp(min=1) / 8) / math.log(16) * 8).long()
        bucket = torch.where(distance < 8, distance, far.clamp(max=15))
        return (scores + self.table(bucket).permute(2, 0, 1)[None]).masked_fill(~causal(scores), LOWEST)


class HiddenAtRandom(nn.Module):
    """Dropout of logits before, of probabilities after the softmax."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.drop, self.before = nn.Dropout(0.5), before

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = raw(q, k)
        if self.before:
            return torch.softmax(self.drop(scores), -1) @ v
        return self.drop(torch.softmax(scores, -1)) @ v


def segments(scores: torch.Tensor) -> torch.Tensor:
    return (columns(scores) // 4) == (rows(scores) // 4)


CASES = (
    case("scale on q", on_q, scale=SCALE),
    case("scale on k", on_k, scale=SCALE),
    case("scale on both sides", on_both, scale=SCALE),
    case("scale on the transposed key", on_transposed_key, scale=0.5),
    case("scale by in-place division", after_scores, scale=SCALE),
    case("scale and mask in place", in_place_scale, scale=0.125, mask="causal"),
    case("mask in place", in_place_fill, scale=SCALE, mask="causal"),
    case("scale is a tensor of one number", scale_tensor, scale=SCALE),
    case("no scale", unscaled, scale=1.0),
    case("softmax in float32", upcast_softmax, scale=SCALE),
    case("scores in float32", upcast_scores, scale=SCALE),
    case("exp over sum, maximum subtracted", stabilised, scale=SCALE),
    case("exp over sum, masked, amax subtracted", stabilised_amax, scale=SCALE, mask="causal", empty_rows="mean"),
    case("exp over sum", bare_exponentials, scale=SCALE),
    case("exp times values over sum", divided_last, scale=SCALE),
    case("exp times reciprocal of sum", reciprocal_sum, scale=SCALE),
    case("exp of log_softmax", log_softmax, scale=SCALE),
    case("exp minus logsumexp", minus_logsumexp, scale=SCALE),
    case("softmax plus one", plus_one, scale=SCALE, sinks=True),
    case("softmax plus one, stabilised", plus_one_stabilised, scale=SCALE, sinks=True),
    case("softmax plus one by padding", plus_one_padded, scale=SCALE, sinks=True),
    case("keys times queries", keys_first, scale=SCALE),
    case("values times probabilities", values_first, scale=SCALE),
    made("sink logits", Sinks, scale=SCALE, sinks=True),
    made("sink logits in front", partial(Sinks, True), scale=SCALE, sinks=True),
    case("keys of one picked head, cast to their own type", upcast_groups, scale=SCALE, kv_heads=1),
    case("sink logits per row", row_sinks, scale=SCALE, sinks=True, mask="causal"),
    case("blocks of a padded length", in_padded_blocks, scale=SCALE),
    made("temperature per head divides scores", partial(Temperature, "scores"), scale=1.0),
    made("temperature per head on q", partial(Temperature, "q"), scale=1.0),
    made("cosine similarity", partial(Temperature, "cosine"), scale=1.0),
    made("norms of q and k", QueryNorm, scale=SCALE),
    case("temperature per query", per_query_temperature, scale=SCALE, gain=True),
    case("nan_to_num after the softmax", guarded, scale=SCALE, mask="causal(-1)", empty_rows="zero"),
    case("hidden probabilities zeroed", refilled, scale=SCALE, mask="causal(-1)", empty_rows="zero"),
    case("masked before and multiplied after", multiplied_after_twice, scale=SCALE, mask="causal"),
    case("values scaled and shifted", sparse_values, scale=SCALE),
    changed("softcap", lambda s: 30 * torch.tanh(s / 30), softcap=30.0),
    changed("softcap, then mask", lambda s: (torch.tanh(s / 20) * 20).masked_fill(~causal(s), LOWEST), softcap=20.0, mask="causal"),
    changed("tanh after a bias", lambda s: 30 * torch.tanh((s + alibi(s)) / 30), ("softcap",)),
    changed("alibi", lambda s: (s + alibi(s)).masked_fill(~causal(s), -torch.inf), mask="causal", biases=1, empty_rows="nan"),
    changed("symmetric alibi", lambda s: s + alibi_symmetric(s), biases=1),
    biased("relative table", RelativeTable, biases=1),
    biased("bucketed relative table", Buckets, biases=1, mask="causal"),
    changed("mask times lowest", lambda s: s + (~causal(s)) * LOWEST, mask="causal", empty_rows="mean"),
    changed("one minus mask, -1e9", lambda s: s + (1 - causal(s).float()) * -1e9, biases=1),
    changed("filled with -1e8", lambda s: s.masked_fill(~causal(s), -1e8), mask="causal", empty_rows="mean"),
    changed("filled with -1e9", lambda s: s.masked_fill(~causal(s), -1e9), mask="causal", empty_rows="mean"),
    changed("filled with -100", lambda s: s.masked_fill(~causal(s), -100.0), ("low enough",)),
    changed("two masks", lambda s: s.masked_fill(~causal(s), -torch.inf).masked_fill(columns(s) < rows(s) - 3, -torch.inf), mask="causal & window(4)"),
    changed("additive hard mask", lambda s: s + hard(s), mask="causal", empty_rows="nan"),
    changed("dilated", lambda s: s.masked_fill(((rows(s) - columns(s)) % 3 != 0) | ~causal(s), -torch.inf), mask="causal & dilated(3)"),
    changed("strided", lambda s: torch.where((rows(s) - columns(s) < 4) & causal(s) | (columns(s) % 4 == 3) & causal(s), s, LOWEST), mask="causal & (window(4) | ((kv % 4) == 3))"),
    changed("blocks", lambda s: s.where(segments(s), torch.tensor(-torch.inf)), mask="chunk(4)"),
    changed("prefix", lambda s: s.masked_fill(~(causal(s) | (columns(s) < 3)), LOWEST), mask="prefix(3)"),
    changed("nothing hidden", lambda s: s.masked_fill(columns(s) < 0, LOWEST), mask="full"),
    changed("scores divided by a negative number", lambda s: s / -2.0, scale=-SCALE / 2),
    changed("masked, then scaled", lambda s: s.masked_fill(~causal(s), LOWEST) * 0.5, scale=SCALE / 2, mask="causal"),
    changed("masked, then negated", lambda s: -s.masked_fill(~causal(s), LOWEST), ("positive",)),
    made("dropout before, eval", partial(HiddenAtRandom, True), scale=SCALE),
    made("dropout after, eval", partial(HiddenAtRandom, False), scale=SCALE),
)  # fmt: skip
