"""A layer that projects to heads, applies a given attention core and projects back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Core = Callable[..., torch.Tensor]


class Heads(nn.Module):
    """x → q [B, H, T, D], k and v [B, G, T, D] → core(q, k, v, …) [B, H, T, D] → [B, T, width]."""

    def __init__(self, core: Core, heads: int = 4, groups: int | None = None, width: int = 32) -> None:
        super().__init__()
        self.core, self.heads, self.groups, self.size = core, heads, groups or heads, width // heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * self.groups * self.size)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        batch, time, width = x.shape
        q = self.to_q(x).view(batch, time, self.heads, self.size).transpose(1, 2)
        k, v = (p.view(batch, time, self.groups, self.size).transpose(1, 2) for p in self.to_kv(x).chunk(2, -1))
        o = self.core(q, k, v, *rest)
        return self.to_out(o.transpose(1, 2).reshape(batch, time, width))


def raw(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scaled scores [B, H, Tq, Tk]."""
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def rows(scores: torch.Tensor) -> torch.Tensor:
    """Query indices [Tq, 1]."""
    return torch.arange(scores.shape[-2], device=scores.device)[:, None]


def columns(scores: torch.Tensor) -> torch.Tensor:
    """Key indices [1, Tk]."""
    return torch.arange(scores.shape[-1], device=scores.device)[None, :]


def causal(scores: torch.Tensor) -> torch.Tensor:
    """True where a key is not after the query."""
    return columns(scores) <= rows(scores)
