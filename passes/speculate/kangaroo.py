"""Kangaroo's adapter: one attention layer that makes the model's first blocks a draft model (Liu et al. 2404.18911, §3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.passes.speculate.early_exit import EarlyExitDrafter
from subquad.passes.speculate.exit_words import EPSILON, ExitWords

HEAD = 64
"""Least width of a head of the adapter."""
BASE = 10000.0
"""Of its rotary embedding."""


class Heads(NamedTuple):
    """Queries, keys and values [..., H, n, D] of n tokens; queries and keys are rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


class Kangaroo(ExitWords):
    """x + o · attention(norm x), then the second norm and the model's head; no MLP, as in the paper.

    o is zero to begin with, so that an untrained adapter is the plain exit behind the first blocks.
    """

    name: ClassVar[str] = "kangaroo"

    def __init__(self, hidden: int, ids: Tensor, exits: Tensor) -> None:
        super().__init__(hidden, ids, exits)
        fits = [n for n in range(max(1, hidden // HEAD), 0, -1) if hidden % n == 0]
        self.heads = fits[0]
        self.norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Parameter(torch.randn(3 * hidden, hidden) * hidden**-0.5)
        self.out = nn.Parameter(torch.zeros(hidden, hidden))

    @property
    def blocks(self) -> int:
        """The model's blocks in front of the adapter."""
        return int(self.exits[0])

    def drafter(self) -> EarlyExitDrafter:
        """Chains of the adapter's likeliest tokens."""
        return EarlyExitDrafter(self)

    @classmethod
    def loaded(cls, parameters: Mapping[str, Tensor], hidden: int) -> Self:
        """From stored parameters."""
        made = cls(hidden, parameters["ids"].clone(), parameters["exits"].clone())
        made.load_state_dict(dict(parameters))
        if made.exits.shape != (1,) or made.blocks < 1:
            raise ValueError(f"exits {made.exits.tolist()} instead of one behind a block")
        return made

    def project(self, stream: Tensor, first: int) -> Heads:
        """What the attention reads of a stream [..., n, d]; first: the place of its first token in the sequence."""
        x = F.rms_norm(stream, (self.hidden,), eps=EPSILON) * self.norm
        parts = self.product(x, self.qkv).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (part.transpose(-2, -3) for part in parts)
        turn = _rotary(first, stream.shape[-2], q.shape[-1] // 2, stream.device)
        return Heads(_turned(q, *turn), _turned(k, *turn), v)

    def mix(self, stream: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """The stream [..., n, d] behind the adapter; k, v: of all tokens that the queries see."""
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return stream + self.product(seen.transpose(-2, -3).flatten(-2), self.out)

    def forward(self, stream: Tensor) -> Tensor:
        """The stream [B, T, d] behind the adapter, of whole sequences."""
        return self.mix(stream, *self.project(stream, 0), causal=True)


def _rotary(first: int, n: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines fp32 [n, pairs]."""
    turns = BASE ** -(torch.arange(pairs, device=device) / max(1, pairs))
    angles = torch.arange(first, first + n, device=device)[:, None] * turns
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first 2 · pairs numbers of each head turned pairwise (2104.09864, eq. 34), in x's dtype."""
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest.float()], -1).to(x.dtype)
