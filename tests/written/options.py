"""An attention layer with every option that libraries of transformer parts offer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden

WIDTH, HEADS, SIZE = 32, 4, 8
SCALE = SIZE**-0.5


class Optional(nn.Module):
    """One layer; each keyword turns one option on.

    memory: learned keys and values before the others.  null: one learned key and zero value.  gate: of the output, from
    x; head_gate: one number per head and token.  value_residual: values are mixed with those given.  alibi, talking
    (before, after), sparse: as in the papers.  normalised: cosine similarity.  qk_norm: RMS norm with a learned scale.
    one_kv: a single key and value head.  flash: SDPA.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.on = options
        groups = 1 if options.get("one_kv") else HEADS
        self.groups = groups
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, n * SIZE, bias=False) for n in (HEADS, groups, groups))
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.mem_k, self.mem_v = (nn.Parameter(torch.randn(HEADS, 3, SIZE)) for _ in range(2))
        self.null_k = nn.Parameter(torch.randn(HEADS, 1, SIZE))
        self.gamma_q, self.gamma_k = (nn.Parameter(torch.rand(HEADS, 1, SIZE) + 0.5) for _ in range(2))
        self.gates, self.head_gates, self.mix = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, HEADS),
            nn.Linear(WIDTH, HEADS),
        )
        self.pre_talk, self.post_talk = (nn.Conv2d(HEADS, HEADS, 1, bias=False) for _ in range(2))
        self.head_scale = nn.Parameter(torch.rand(1, HEADS, 1, 1))

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(*x.shape[:2], heads, SIZE).transpose(1, 2)

    def forward(self, x: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
        on, (b, t, _) = self.on, x.shape
        q, k, v = (
            self.split(self.to_q(x), HEADS),
            self.split(self.to_k(x), self.groups),
            self.split(self.to_v(x), self.groups),
        )
        if on.get("value_residual"):
            share = self.mix(x).sigmoid().transpose(1, 2).unsqueeze(-1)
            v = v.lerp(self.split(first, HEADS), share)
        if on.get("normalised"):
            q, k = F.normalize(q, dim=-1) * math.sqrt(10), F.normalize(k, dim=-1) * math.sqrt(10)
        if on.get("qk_norm"):
            q = F.normalize(q, dim=-1) * SIZE**0.5 * self.gamma_q
            k = F.normalize(k, dim=-1) * SIZE**0.5 * self.gamma_k
        before = 0
        if on.get("memory"):
            k, v = (torch.cat([m.expand(b, -1, -1, -1), y], 2) for m, y in ((self.mem_k, k), (self.mem_v, v)))
            before = 3
        if on.get("null"):
            k = torch.cat([self.null_k.expand(b, -1, -1, -1), k], -2)
            v = F.pad(v, (0, 0, 1, 0))
            before += 1
        seen = None
        if on.get("causal"):
            seen = F.pad(~torch.ones(t, t, dtype=torch.bool).triu(1), (before, 0), value=True)
        if on.get("flash"):
            k, v = (y.expand(-1, HEADS, -1, -1) for y in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            scores = q @ k.mT * (1.0 if on.get("normalised") else SCALE)
            if on.get("talking") == "before":
                scores = self.pre_talk(scores)
            if on.get("alibi"):
                i, j = torch.arange(t), torch.arange(k.shape[2])
                slopes = torch.tensor([2.0 ** (-2 * n) for n in range(1, HEADS + 1)])
                scores = scores - slopes.view(-1, 1, 1) * (i[:, None] - j[None]).abs()
            if on.get("softclamp"):
                scores = (scores / 15).tanh() * 15
            if seen is not None:
                scores = scores.masked_fill(~seen, -torch.finfo(scores.dtype).max)
            if on.get("sparse"):
                top, _ = scores.topk(2, dim=-1)
                scores = scores.masked_fill(scores < top[..., -1:], -torch.finfo(scores.dtype).max)
            weights = scores.softmax(-1, dtype=torch.float32).type(q.dtype)
            if on.get("talking") == "after":
                weights = self.post_talk(weights)
            out = weights @ v
        if on.get("head_scale"):
            out = out * self.head_scale
        if on.get("head_gate"):
            out = out * self.head_gates(x).sigmoid().transpose(1, 2).unsqueeze(-1)
        out = out.transpose(1, 2).reshape(b, t, WIDTH)
        if on.get("gate"):
            out = out * self.gates(x).sigmoid()
        return self.to_out(out)


class Written(nn.Module):
    """Audio-style attention: the scale's root on both operands, self or cross, with a slice of a kept triangle."""

    def __init__(self, cross: bool, flash: bool = False) -> None:
        super().__init__()
        self.cross, self.flash = cross, flash
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("mask", torch.empty(64, 64).fill_(-torch.inf).triu_(1), persistent=False)

    def forward(self, x: torch.Tensor, xa: torch.Tensor) -> torch.Tensor:
        q, source = self.query(x), xa if self.cross else x
        k, v = self.key(source), self.value(source)
        n_ctx = q.shape[1]
        scale = SIZE**-0.25
        q, k, v = (y.view(*y.shape[:2], HEADS, -1).permute(0, 2, 1, 3) for y in (q, k, v))
        if self.flash:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=not self.cross and n_ctx > 1)
            return self.out(a.permute(0, 2, 1, 3).flatten(start_dim=2))
        qk = (q * scale) @ (k * scale).transpose(-1, -2)
        if not self.cross:
            qk = qk + self.mask[:n_ctx, :n_ctx]
        w = F.softmax(qk.float(), dim=-1).to(q.dtype)
        return self.out((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))


def two(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, time, WIDTH), torch.randn(batch, time, WIDTH)


def longer(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, time, WIDTH), torch.randn(batch, time + 5, WIDTH)


WORDS = {"heads": HEADS, "kv_heads": HEADS, "head_dim": SIZE, "scale": SCALE}


def one(name: str, options: dict[str, Any], inputs: Any = None, **words: Any) -> Case:
    return Case(name, partial(Optional, **options), inputs or hidden(), (WORDS | words,))


def none(name: str, refused: str, **options: Any) -> Case:
    return Case(name, partial(Optional, **options), hidden(), (), (refused,))


CASES = (
    one("causal", {"causal": True}, mask="causal", empty_rows="mean"),
    one("one key and value head", {"one_kv": True, "causal": True}, kv_heads=1, mask="causal"),
    one("one key and value head, flash", {"one_kv": True, "flash": True}, kv_heads=1, mask="full"),
    one("memory keys", {"memory": True}, mask="full"),
    one("memory keys, causal", {"memory": True, "causal": True}, mask="causal(3)"),
    one("memory keys, causal, flash", {"memory": True, "causal": True, "flash": True}, mask="causal(3)"),
    one("null key", {"null": True}, mask="full"),
    one("null key, causal", {"null": True, "causal": True}, mask="causal(1)"),
    one("alibi of an encoder", {"alibi": True}, biases=1),
    one("alibi, causal", {"alibi": True, "causal": True}, biases=1, mask="causal"),
    one("cosine similarity", {"normalised": True}, scale=10.0),
    one("learned norms", {"qk_norm": True, "causal": True}, mask="causal"),
    one("soft clamp", {"softclamp": True, "causal": True}, mask="causal", softcap=15.0),
    one("gated output", {"gate": True}),
    one("gated heads", {"head_gate": True}),
    one("scaled heads", {"head_scale": True}),
    one("value residual", {"value_residual": True}, two),
    one("everything that stays attention", {"memory": True, "null": True, "causal": True, "gate": True, "qk_norm": True, "softclamp": True},
        mask="causal(4)", softcap=15.0),
    none("talking heads before", "", talking="before"),
    none("talking heads after", "", talking="after", causal=True),
    none("sparse", "computed from", sparse=True),
    Case("root scale, self", partial(Written, False), longer, (WORDS | {"mask": "causal", "empty_rows": "nan"},)),
    Case("root scale, cross", partial(Written, True), longer, (WORDS | {"mask": "full", "phase": "cross"},)),
    Case("self, flash", partial(Written, False, True), longer, (WORDS | {"mask": "causal"},), dialects=("export", "verified", "dynamo")),
    Case("cross, flash", partial(Written, True, True), longer, (WORDS | {"mask": "full"},)),
)  # fmt: skip
