"""Small models with attention spelled in different ways, and softmaxes that are no attention, for the tests."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def tiny_llama(layers: int = 2, implementation: str = "sdpa", **overrides: Any) -> nn.Module:
    """A random Llama: 6 query heads, 2 key/value heads of size 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 256, "eos_token_id": None,
    }  # fmt: skip
    config = LlamaConfig(**(settings | overrides))
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def sharp_llama(layers: int) -> Any:
    """The same with logits twenty times as far apart, so that rounding decides no token."""
    model = tiny_llama(layers)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


class CausalBufferAttention(nn.Module):
    """Fused projection, a causal buffer of its own, masked_fill with -inf."""

    def __init__(self, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer(
            "seen", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest), persistent=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.seen[:, :, :time, :time] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(batch, time, width))


class DecoderBlock(nn.Module):
    """Pre-norm block with an MLP."""

    def __init__(self, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalBufferAttention(width, heads, longest)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class HandWrittenDecoder(nn.Module):
    """A decoder-only language model with learned positions, written out by hand."""

    def __init__(
        self, vocabulary: int = 50, width: int = 32, heads: int = 4, longest: int = 64, layers: int = 2
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, longest) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TwoSpellings(nn.Module):
    """An SDPA call and an einsum attention in one forward."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, time, width = x.shape
        return tuple(
            part.view(batch, time, self.heads, width // 3 // self.heads).transpose(1, 2) for part in x.chunk(3, dim=-1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = self._split(self.first(x))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time, width)
        q, k, v = self._split(self.second(x))
        weights = torch.einsum("bhqd,bhkd->bhqk", q * (width // self.heads) ** -0.5, k).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2).reshape(batch, time, width)


class Router(nn.Module):
    """A mixture of experts: its softmax is no attention."""

    def __init__(self, width: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = torch.softmax(self.gate(x), -1).topk(2, -1)
        outputs = [
            expert(x) * torch.where(chosen == n, weight, torch.zeros_like(weight)).sum(-1, keepdim=True)
            for n, expert in enumerate(self.experts)
        ]
        return torch.stack(outputs).sum(0)


class Pooling(nn.Module):
    """Softmax pooling over tokens with a learned query: a product with a weight, no attention between tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.matmul(x, self.query).transpose(1, 2), -1) @ x


class LinearAttention(nn.Module):
    """Softmax feature maps and no product of queries and keys: linear attention already."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q, -1) @ (torch.softmax(k, -1).transpose(1, 2) @ v)


class ScoredAttention(nn.Module):
    """One head attention whose mask or score change is a function given to the constructor."""

    def __init__(self, change: Any, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.change = nn.Linear(width, 3 * width), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return (torch.softmax(self.change((q @ k.transpose(-1, -2)) * 0.25), -1) @ v).squeeze(1)
