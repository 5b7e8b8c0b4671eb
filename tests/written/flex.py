"""PyTorch's FlexAttention: a higher-order operator with a score function and a block mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from written.case import Case, hidden

WIDTH, HEADS, SIZE = 32, 4, 8


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


def near(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q >= kv) & (q - kv < 4)


def relative(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return score + (kv - q)


def capped(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return 20 * torch.tanh(score / 20)


class Flex(nn.Module):
    def __init__(self, score: Any = None, mask: Any = None, groups: int = HEADS) -> None:
        super().__init__()
        self.score, self.mask, self.groups = score, mask, groups
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * groups * SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, SIZE).transpose(1, 2)
        k, v = (y.view(b, t, self.groups, SIZE).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        blocks = (
            None if self.mask is None else create_block_mask(self.mask, None, None, t, t, device="cpu", BLOCK_SIZE=16)
        )
        o = flex_attention(q, k, v, score_mod=self.score, block_mask=blocks, enable_gqa=self.groups != HEADS)
        return o.transpose(1, 2).reshape(b, t, WIDTH)


def case(name: str, words: dict[str, Any], **settings: Any) -> Case:
    return Case(
        name,
        partial(Flex, **settings),
        hidden(),
        ({"heads": HEADS, "scale": SIZE**-0.5} | words,),
        dialects=("export", "verified", "dynamo"),
        quick=(),
    )


CASES = (
    case("flex", {"mask": "full"}),
    case("flex, grouped", {"kv_heads": 2}, groups=2),
    case("flex, causal blocks", {"mask": "causal"}, mask=causal),
    case("flex, window blocks", {"mask": "causal & window(4)"}, mask=near),
    case("flex, relative score", {"biases": 1}, score=relative),
    case("flex, capped score", {"softcap": 20.0}, score=capped),
)  # fmt: skip
