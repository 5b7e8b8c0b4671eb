"""One layer of attention over what stands before, for drafters that read more than the last hidden state."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor], Tensor]
BASE = 10_000.0
"""Of the rotary angles."""


class ContextLayer(nn.Module):
    """Pre-norm attention with rotary positions and a gated feed-forward part, both added to the stream; width w, H heads."""

    def __init__(self, width: int) -> None:
        """width: w, even.  Adds nothing to begin with."""
        super().__init__()
        self.width, self.heads = width, next(n for n in (4, 2, 1) if width % (2 * n) == 0)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.output = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.down.weight)

    def keys(self, x: Tensor, positions: Tensor, product: Product) -> tuple[Tensor, Tensor]:
        """Keys and values [..., n, H, w / H] of a stream [..., n, w] at positions int64 [n] or [..., n]."""
        x = F.rms_norm(x, (self.width,))
        return self._turned(product(x, self.key.weight), positions), self._split(product(x, self.value.weight))

    def forward(
        self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, product: Product
    ) -> Tensor:
        """The stream [B, n, w] behind the layer; keys, values: [B, m, H, w / H].  seen: bool [..., n, m], None for all."""
        q = self._turned(product(F.rms_norm(x, (self.width,)), self.query.weight), positions)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen
        )
        x = x + product(mixed.transpose(1, 2).flatten(2), self.output.weight)
        y = F.rms_norm(x, (self.width,))
        return x + product(F.silu(product(y, self.gate.weight)) * product(y, self.up.weight), self.down.weight)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.width // self.heads))

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """Heads with their halves turned by position."""
        x = self._split(x)
        half = x.shape[-1] // 2
        angles = positions[..., None, None] * BASE ** (-torch.arange(half, device=x.device) / half)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
