"""Decoder-only language models as written by hand: learned positions, rotary positions, caches, prefixes and documents."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, token_ids
from written.rotary import complex_rotation, half_rotation, interleaved_rotation, turn_complex, turn_half, turn_pairs

WIDTH, HEADS, SIZE = 32, 4, 8


class LearnedPositionsBlock(nn.Module):
    """Pre-norm block: one projection for q, k and v, and either SDPA or a triangle of its own."""

    def __init__(self, longest: int, flash: bool, bias: bool) -> None:
        super().__init__()
        self.flash = flash
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=bias), nn.LayerNorm(WIDTH, bias=bias)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH), nn.Dropout(0.1))
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(longest, longest))[None, None])

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        if self.flash:
            dropout = self.attn_dropout.p if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class LearnedPositions(nn.Module):
    """Tied embeddings, learned positions, logits and a loss when targets are given."""

    def __init__(self, flash: bool, bias: bool = True, longest: int = 64) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, WIDTH), nn.Embedding(longest, WIDTH)
        self.h = nn.ModuleList(LearnedPositionsBlock(longest, flash, bias) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH, bias=bias), nn.Linear(WIDTH, 50, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class RotaryLayer(nn.Module):
    """Grouped heads, rotary positions, mask handed down by the model."""

    def __init__(self, groups: int, repeat: str, rotary: str) -> None:
        super().__init__()
        self.groups, self.repeat, self.rotary = groups, repeat, rotary
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, groups * SIZE, bias=False) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)

    def heads_repeated(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, G, D] → [B, T, H, D]."""
        b, t, g, d = x.shape
        n = HEADS // g
        if self.repeat == "expand":
            return x[:, :, :, None, :].expand(b, t, g, n, d).reshape(b, t, g * n, d)
        if self.repeat == "interleave":
            return x.repeat_interleave(n, dim=2)
        if self.repeat == "stack":
            return torch.stack([x] * n, dim=3).flatten(2, 3)
        return x.unsqueeze(3).repeat(1, 1, 1, n, 1).view(b, t, g * n, d)

    def forward(self, x: torch.Tensor, freqs: Any, mask: torch.Tensor | None) -> torch.Tensor:
        b, t, _ = x.shape
        h = self.norm(x)
        xq = self.wq(h).view(b, t, HEADS, SIZE)
        xk, xv = (w(h).view(b, t, self.groups, SIZE) for w in (self.wk, self.wv))
        turn = {"complex": turn_complex, "half": turn_half, "pairs": turn_pairs}[self.rotary]
        xq, xk = turn(xq, freqs), turn(xk, freqs)
        keys, values = self.heads_repeated(xk), self.heads_repeated(xv)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(SIZE)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        out = torch.matmul(scores, values).transpose(1, 2).contiguous().view(b, t, -1)
        return x + self.wo(out)


class RotaryDecoder(nn.Module):
    """Triangle of -inf made once in the forward and given to every layer."""

    def __init__(self, groups: int = 2, repeat: str = "expand", rotary: str = "complex", longest: int = 64) -> None:
        super().__init__()
        self.tok = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(RotaryLayer(groups, repeat, rotary) for _ in range(2))
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 50, bias=False)
        make = {"complex": complex_rotation, "half": half_rotation, "pairs": interleaved_rotation}[rotary]
        self.freqs = make(SIZE, longest)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        t = tokens.shape[1]
        h = self.tok(tokens)
        freqs = self.freqs[:t]
        mask = None
        if t > 1:
            mask = torch.full((t, t), float("-inf"), device=tokens.device)
            mask = torch.triu(mask, diagonal=1).type_as(h)
        for layer in self.layers:
            h = layer(h, freqs, mask)
        return self.output(self.norm(h)).float()


class SharedMask(nn.Module):
    """A stack of SDPA layers under one boolean mask that a function makes of the ids."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask
        self.tok = nn.Embedding(50, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, tokens: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        b, t = tokens.shape
        x, seen = self.tok(tokens), self.mask(tokens) if given is None else self.mask(tokens, given)
        for qkv in self.qkv:
            q, k, v = qkv(x).view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        return x


def triangle(tokens: torch.Tensor) -> torch.Tensor:
    t = tokens.shape[1]
    return torch.ones(t, t, dtype=torch.bool, device=tokens.device).tril()


def documents(tokens: torch.Tensor) -> torch.Tensor:
    """Documents end with token 0; a token sees its own document only."""
    ids = (tokens == 0).cumsum(1)
    return ((ids[:, :, None] == ids[:, None, :]) & triangle(tokens))[:, None]


def given_documents(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (ids.unsqueeze(-1) == ids.unsqueeze(-2)).unsqueeze(1) & triangle(tokens)


def given_prefix(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The first `lengths` tokens of a row see each other."""
    inside = torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths[:, None]
    return (triangle(tokens)[None] | inside[:, None, :])[:, None]


def given_lengths(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    real = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape) < lengths.unsqueeze(1)
    return real[:, None, None, :] & triangle(tokens)


def not_padding(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens != 1)[:, None, None, :]


def padding_and_triangle(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask[:, None, None, :].bool() & triangle(tokens)


def additive_padding(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min


def square_padding(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Padded queries see nothing, so that whole rows are hidden."""
    real = mask.bool()
    return (real[:, :, None] & real[:, None, :])[:, None]


def as_given(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask


def lengths(batch: int, time: int) -> torch.Tensor:
    return torch.arange(batch) * 2 % (time - 2) + 2


def padded(batch: int, time: int) -> torch.Tensor:
    """Right padding of different lengths."""
    return (torch.arange(time)[None] < lengths(batch, time)[:, None]).long()


def with_ids(make: Any) -> Any:
    def inputs(batch: int, time: int) -> tuple[torch.Tensor, ...]:
        return torch.randint(0, 50, (batch, time)), make(batch, time)

    return inputs


def random_mask(shape: str, additive: bool = False) -> Any:
    def make(batch: int, time: int) -> torch.Tensor:
        sizes = {"2": (time, time), "3": (batch, 1, time, time), "4": (batch, HEADS, time, time)}[shape]
        seen = (torch.rand(sizes) > 0.4) | torch.eye(time, dtype=torch.bool)
        return torch.zeros(sizes).masked_fill(~seen, -torch.inf) if additive else seen

    return make


def layers(**words: Any) -> tuple[dict[str, Any], ...]:
    return ({"heads": HEADS, "head_dim": SIZE, **words},) * 2


def shared(name: str, seen: Any, make: Any = None, **words: Any) -> Case:
    inputs = token_ids() if make is None else with_ids(make)
    return Case(name, partial(SharedMask, seen), inputs, layers(**words))


def rotary(name: str, quick: tuple[str, ...] = (), **settings: Any) -> Case:
    words = {"kv_heads": settings.get("groups", 2), "mask": "causal", "empty_rows": "nan"}
    return Case(name, partial(RotaryDecoder, **settings), token_ids(), layers(**words), quick=quick)


CASES = (
    Case("learned positions, triangle", partial(LearnedPositions, False), token_ids(), layers(mask="causal")),
    Case("learned positions, sdpa", partial(LearnedPositions, True, False), token_ids(), layers(mask="causal"),
         quick=()),
    Case("learned positions with a loss", partial(LearnedPositions, False),
         lambda b, t: (torch.randint(0, 50, (b, t)), torch.randint(0, 50, (b, t))), layers(mask="causal"), quick=()),
    rotary("complex rotary, expanded groups", ("export",)),
    rotary("complex rotary, one group", groups=1),
    rotary("half rotary, interleaved groups", repeat="interleave", rotary="half"),
    rotary("paired rotary, repeated groups", repeat="repeat", rotary="pairs"),
    rotary("paired rotary, stacked groups", repeat="stack", rotary="pairs"),
    rotary("half rotary, no groups", groups=4, rotary="half"),
    shared("triangle as sdpa mask", triangle, mask="causal", empty_rows="zero"),
    shared("documents by end tokens", documents, mask="causal & documents(cumsum of tokens)"),
    shared("documents given", given_documents, lambda b, t: torch.arange(t).expand(b, t) // 3,
           mask="causal & documents(given)"),
    shared("prefix lengths given", given_prefix, lengths, mask="prefix(given)"),
    shared("lengths given", given_lengths, lengths, mask="causal & lengths(given)"),
    shared("padding from ids", not_padding, mask="keys(tokens[b, kv] != 1)"),
    shared("padding mask and triangle", padding_and_triangle, padded, mask="causal & padding(given)"),
    shared("additive padding mask", additive_padding, padded, mask="full", biases=1),
    shared("padding on both sides of the square", square_padding, padded,
           mask="padding(given) & queries(given[b, q] != 0)", empty_rows="zero"),
    shared("user's mask [T, T]", as_given, random_mask("2"), mask="opaque"),
    shared("user's mask [B, 1, T, T]", as_given, random_mask("3"), mask="opaque"),
    shared("user's mask [B, H, T, T]", as_given, random_mask("4"), mask="opaque"),
    shared("user's additive mask", as_given, random_mask("3", True), biases=1),
)  # fmt: skip
