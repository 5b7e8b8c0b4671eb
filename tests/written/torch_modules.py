"""PyTorch's own attention modules, with every argument that changes their path."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from written.case import Case

WIDTH, HEADS = 32, 4


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of one input with itself."""

    def __init__(
        self, weights: bool = False, batch_first: bool = True, keep_weights: bool = False, **call: Any
    ) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, dropout=0.1)
        self.weights, self.keep, self.call = weights, keep_weights, call

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> Any:
        t = x.shape[1 if self.attn.batch_first else 0]
        call = dict(self.call)
        if call.pop("triangle", False):
            call["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(t, dtype=x.dtype)
        if call.pop("bool_triangle", False):
            call["attn_mask"] = torch.ones(t, t, dtype=torch.bool).triu(1)
        out, weights = self.attn(x, x, x, key_padding_mask=padding, need_weights=self.weights, **call)
        return (out, weights) if self.keep else out


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with keys and values of other widths, and its own further keys."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=24, vdim=20, **settings)

    def forward(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attn(x, k, v, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(
        self, nested: bool = True, norm_first: bool = False, causal: bool = False, batch_first: bool = True
    ) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.causal = causal

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        mask = None
        if self.causal:
            t = x.shape[1 if self.encoder.layers[0].self_attn.batch_first else 0]
            mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        return self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.causal)


class Decoder(nn.Module):
    def __init__(self, hint: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, batch_first=True)
        self.decoder, self.hint = nn.TransformerDecoder(layer, 2), hint

    def forward(self, x: torch.Tensor, memory: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.decoder(x, memory, mask, memory_key_padding_mask=padding, tgt_is_causal=self.hint)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(WIDTH, HEADS, 1, 1, 48, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.model(source, target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]))


class Checkpointed(nn.Module):
    """Layers that are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention(triangle=True, is_causal=True) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def x(batch: int, time: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, time, WIDTH),)


def time_first(batch: int, time: int) -> tuple[torch.Tensor]:
    return (torch.randn(time, batch, WIDTH),)


def padded(batch: int, time: int) -> tuple[torch.Tensor, torch.Tensor]:
    """True marks padding; no row is all padding."""
    return torch.randn(batch, time, WIDTH), torch.arange(time)[None] >= (torch.arange(batch)[:, None] % 3 + 4)


def time_first_padded(batch: int, time: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, padding = padded(batch, time)
    return hidden.transpose(0, 1).contiguous(), padding


def memory(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    hidden, padding = padded(batch, time + 4)
    return torch.randn(batch, time, WIDTH), hidden, padding


def other_widths(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, time, WIDTH), torch.randn(batch, time + 3, 24), torch.randn(batch, time + 3, 20)


def own(
    name: str, inputs: Any, refused: tuple[str, ...] = (), words: dict[str, Any] | None = None, **settings: Any
) -> Case:
    found = () if refused else ({"heads": HEADS, "head_dim": 8, "scale": 8**-0.5, **(words or {})},)
    return Case(name, partial(SelfAttention, **settings), inputs, found, refused)


HEAVY: dict[str, Any] = {"quick": ()}

CASES = (
    own("mha", x, words={"mask": "full"}),
    own("mha, time first", time_first, words={"mask": "full"}, batch_first=False),
    own("mha, weights made and dropped", x, words={"mask": "full"}, weights=True),
    own("mha, weights returned", x, ("",), weights=True, keep_weights=True),
    own("mha, weights per head returned", x, ("",), weights=True, keep_weights=True, average_attn_weights=False),
    own("mha, additive triangle", x, words={"mask": "causal"}, triangle=True),
    own("mha, additive triangle, weights", x, words={"mask": "causal"}, triangle=True, weights=True),
    own("mha, boolean triangle", x, words={"mask": "causal"}, bool_triangle=True),
    own("mha, is_causal", x, words={"mask": "causal"}, triangle=True, is_causal=True),
    own("mha, padding", padded, words={"mask": "keys(padding[b, kv] == 0)"}),
    own("mha, padding, weights", padded, words={"mask": "keys(padding[b, kv] == 0)"}, weights=True),
    own("mha, padding and triangle", padded, words={"mask": "causal & keys(padding[b, kv] == 0)"}, bool_triangle=True),
    own("mha, padding and triangle, time first", time_first_padded, words={"mask": "causal & keys(padding[b, kv] == 0)"},
        batch_first=False, bool_triangle=True),
    Case("mha, other widths", CrossAttention, other_widths, ({"heads": HEADS, "mask": "full", "phase": "cross"},)),
    Case("mha, bias_k and a zero key", partial(CrossAttention, add_bias_kv=True, add_zero_attn=True), other_widths, ({"heads": HEADS, "mask": "full"},)),
    Case("encoder", Encoder, x, ({"mask": "full"},) * 2, **HEAVY),
    Case("encoder, norm first", partial(Encoder, False, True), x, ({"mask": "full"},) * 2, **HEAVY),
    Case("encoder, time first", partial(Encoder, False, batch_first=False), time_first, ({"mask": "full"},) * 2, **HEAVY),
    Case("encoder, padding", partial(Encoder, False), padded, ({"mask": "keys(padding[b, kv] == 0)"},) * 2, **HEAVY),
    Case("encoder, padding, nested tensors allowed", Encoder, padded, ({"mask": "keys(padding[b, kv] == 0)"},) * 2, **HEAVY),
    Case("encoder, causal", partial(Encoder, False, True, True), x, ({"mask": "causal"},) * 2, **HEAVY),
    Case("encoder, causal and padding", partial(Encoder, False, True, True), padded, ({"mask": "causal & keys(padding[b, kv] == 0)"},) * 2, **HEAVY),
    Case("decoder", Decoder, memory, ({"mask": "causal"}, {"mask": "keys(padding[b, kv] == 0)", "phase": "cross"}) * 2, **HEAVY),
    Case("decoder without the hint", partial(Decoder, False), memory, ({"mask": "causal"}, {"mask": "keys(padding[b, kv] == 0)"}) * 2, **HEAVY),
    Case("encoder and decoder", Both, lambda b, t: (torch.randn(b, t + 2, WIDTH), torch.randn(b, t, WIDTH)),
         ({"mask": "full"}, {"mask": "causal"}, {"mask": "full", "phase": "cross"}), (), ("export", "verified"), **HEAVY),
    Case("checkpointed layers", partial(Checkpointed, False), x, ({"mask": "causal"},) * 2),
    Case("checkpointed layers, reentrant", partial(Checkpointed, True), x, ({"mask": "causal"},) * 2, **HEAVY),
)  # fmt: skip
