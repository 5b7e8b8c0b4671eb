"""Tiny random models whose attention comes by its operands in different ways, for the tests of provenance."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def huggingface(name: str, implementation: str = "eager", **settings: Any) -> nn.Module:
    """A random model of a transformers architecture, in float64, with weights that no norm hides."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    heads = {"Bert": "ForMaskedLM", "T5": "EncoderModel", "GPT2": "LMHeadModel"}
    kind = getattr(transformers, f"{name}{heads.get(name, 'ForCausalLM')}")
    model = kind._from_config(config, attn_implementation=implementation).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.dim() == 1 else 0.0))
    return model


def latent() -> nn.Module:
    """Multi-head latent attention."""
    return huggingface(
        "DeepseekV3", **SMALL, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=6,
        v_head_dim=10, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip


class ComplexRotary(nn.Module):
    """The reference Llama's attention: q and k as complex numbers times a table of rotations, sliced from a buffer."""

    def __init__(self, width: int = 32, heads: int = 4, longest: int = 64) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.wq, self.wk, self.wv = (nn.Linear(width, width, bias=False) for _ in range(3))
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, self.size, 2).double() / self.size)
        angles = torch.outer(torch.arange(longest).double(), frequencies)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        turns = self.turns[: x.shape[1]].view(1, x.shape[1], 1, -1)
        return torch.view_as_real(pairs * turns).flatten(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).view(*x.shape[:2], self.heads, self.size) for w in (self.wq, self.wk, self.wv))
        q, k = self.turned(q), self.turned(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return F.softmax(q @ k.transpose(2, 3) / math.sqrt(self.size), dim=-1) @ v


class StackedRotary(nn.Module):
    """Pairs taken apart by steps of two, turned by tables made in the forward, put together by a stack; one fused weight."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)

    def turned(self, x: torch.Tensor, offset: int = 3) -> torch.Tensor:
        frequencies = 500.0 ** (-torch.arange(0, self.size, 2).double() / self.size)
        angles = torch.einsum("t,f->tf", (torch.arange(x.shape[2]) + offset).double(), frequencies)
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)


class Turned(nn.Module):
    """Rotation spelled by a function that the test gives, so that it may be wrong."""

    def __init__(self, turn: Any, width: int = 16) -> None:
        super().__init__()
        self.turn = turn
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1]).double()[:, None] * 0.5 ** torch.arange(8).double()
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        q, k, v = self.turn(self.q(x), cos, sin), self.turn(self.k(x), cos, sin), self.v(x)
        return torch.softmax(q @ k.transpose(1, 2), -1) @ v
