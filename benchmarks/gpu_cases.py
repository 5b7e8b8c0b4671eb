"""The cases of benchmarks/gpu.py: operators to check and to time, their peers, and what each must move and compute."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.codegen.recurrence_call import recurrence_forward
from subquad.codegen.softmax_call import softmax_forward
from subquad.kernels import RecurrenceSpec, SoftmaxSpec, recurrence, softmax_attention
from subquad.kernels.surroundings import Epilogue, Prologue, Surroundings, finished, prepared

Run = Callable[[], Any]
HEDGEHOG = ("softmax(x @ w0)", "softmax(-(x @ w0))")
RECURRENCES = {
    "linear": RecurrenceSpec(("x",), 0.1, normaliser="none"),
    "normalised": RecurrenceSpec(("relu(x) + 0.1",), 0.1),
    "simple gated": RecurrenceSpec(("x",), 0.1, decay="token", normaliser="none"),
    "head decay": RecurrenceSpec(("x",), 0.1, decay="head", normaliser="none"),
    "GLA": RecurrenceSpec(("x",), 0.1, decay="channel", normaliser="none"),
    "delta": RecurrenceSpec(("x",), 0.1, update="delta", normaliser="none"),
    "gated delta": RecurrenceSpec(("x",), 0.1, decay="token", update="delta", normaliser="none"),
    "KDA": RecurrenceSpec(("x",), 0.1, decay="channel", update="delta", normaliser="none"),
    "LightNet": RecurrenceSpec(("x",), 0.1, decay="additive", normaliser="none"),
    "Hedgehog": RecurrenceSpec(HEDGEHOG, 0.1),
    "LoLCATs": RecurrenceSpec(HEDGEHOG, 0.125, window=64, sinks=4),
    "LION": RecurrenceSpec(("relu(x) + 0.1",), 0.1, decay="token", causal=False),
    "both ways": RecurrenceSpec(("x",), 0.1, decay="channel", normaliser="rms", causal=False),
    "Liger": RecurrenceSpec(("softmax(x)",), 0.125, decay="token", normaliser="none", window=64, branch="convex"),
}
SOFTMAXES = {
    "full": SoftmaxSpec(0.1),
    "causal": SoftmaxSpec(0.1, mask="q >= kv"),
    "window": SoftmaxSpec(0.1, mask="(q >= kv) & (q - kv < 32)"),
    "softcap": SoftmaxSpec(0.1, softcap=20.0, mask="q >= kv"),
    "documents": SoftmaxSpec(0.1, mask="(t0[q] == t0[kv]) & (q >= kv)"),
}
TIMED = {
    "simple gated": "chunk_simple_gla",
    "GLA": "chunk_gla",
    "delta": "chunk_delta_rule",
    "gated delta": "chunk_gated_delta_rule",
}
"""Timed recurrences and their functions in flash-linear-attention."""
MODULES = {
    "chunk_simple_gla": "fla.ops.simple_gla",
    "chunk_gla": "fla.ops.gla",
    "chunk_delta_rule": "fla.ops.delta_rule",
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
}


@dataclass(frozen=True)
class Shape:
    """Batch, tokens, query heads, KV heads, head size."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    size: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} H{self.heads}/{self.kv_heads} D{self.size}"


@dataclass
class Timing:
    """One row of the table: what runs, ours and peers by name (with the tensors to differentiate), bytes and operations
    that any implementation needs.
    """

    name: str
    shape: Shape
    runs: dict[str, Run]
    leaves: list[Tensor]
    bytes: float
    operations: float
    backward: bool = True


def peer(name: str) -> Callable[..., Any] | None:
    """A function of flash-linear-attention, or None where it cannot be imported."""
    try:
        return getattr(importlib.import_module(MODULES[name]), name)  # type: ignore[no-any-return]
    except Exception:
        return None


def recurrence_timing(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Timing:
    """The recurrence through its operator, and flash-linear-attention's function on the same tensors."""
    spec = RECURRENCES[name]
    generator = torch.Generator().manual_seed(0)
    b, t, h, d = shape.batch, shape.tokens, shape.heads, shape.size

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    q, k, v = draw(b, t, h, d), torch.nn.functional.normalize(draw(b, t, h, d), dim=-1), draw(b, t, h, d)
    gate_size = {"token": (b, t, h), "channel": (b, t, h, d)}.get(spec.decay)
    g = None if gate_size is None else torch.nn.functional.logsigmoid(draw(*gate_size).float() + 3.0)
    beta = draw(b, t, h).sigmoid() if spec.update == "delta" else None
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta) if x is not None]
    text = spec.json()

    def ours() -> Tensor:
        return recurrence(q, k, v, g, beta, [], [], None, None, None, None, None, None, None, text)[0]

    runs: dict[str, Run] = {"subquad": ours}
    function = peer(TIMED[name]) if name in TIMED else None
    if function is not None:
        extra = {key: value for key, value in (("g", g), ("beta", beta)) if value is not None}
        runs["flash-linear-attention"] = lambda: function(q=q, k=k, v=v, scale=spec.scale, **extra)[0]
    element = q.element_size()
    moved = (
        4 * q.numel() * element + (0 if g is None else g.numel() * 4) + (0 if beta is None else beta.numel() * element)
    )
    chunk = 64
    operations = b * t * h * (4 * d * d + 4 * chunk * d) * (2 if spec.update == "delta" else 1)
    return Timing(name, shape, runs, leaves, float(moved), float(operations))


def surroundings(size: int, keys_too: bool) -> Surroundings:
    """RMS norm with weight and rotary embedding in front, RMS norm with weight and silu gate behind."""
    part = Prologue("rms", weight=True, rotary=size)
    return Surroundings(part, part if keys_too else Prologue(), Epilogue("rms", weight=True, gate="silu"))


def surrounded_timing(family: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Timing:
    """A forward pass with norms, rotary embedding and gate in its kernels, against the same operator with them compiled around
    it: "softmax" (causal; k is finished) or "gated delta".
    """
    b, t, h, hkv, d = shape.batch, shape.tokens, shape.heads, shape.kv_heads, shape.size
    around = surroundings(d, keys_too=family != "softmax")
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    q, k, v = draw(b, t, h, d), draw(b, t, hkv, d), draw(b, t, hkv, d)
    angles = torch.outer(torch.arange(t), 10000.0 ** (-torch.arange(0, d, 2) / d))[None].to(device)
    whole = {f"{side}_{name}": table for side in "qk" for name, table in (("cos", angles.cos()), ("sin", angles.sin()))}
    whole |= {name: torch.ones(d, device=device) for name in ("q_weight", "k_weight", "o_weight")} | {
        "o_gate": draw(b, t, h, d)
    }
    tensors = {name: whole[name] for name in around.tensors}
    outer = {"around": around.json(), "surroundings": tensors}
    compiled = partial(torch.compile, dynamic=False, disable=device.type == "cpu")
    before = compiled(lambda x, side: prepared(x, getattr(around, side), side, tensors))
    behind = compiled(lambda x: finished(x, around.o, tensors))
    if family == "softmax":
        names = ("rows", "lengths", "positions", "operands", "scalars")
        spec = SoftmaxSpec(d**-0.5, mask="q >= kv").json()
        given = dict.fromkeys(("q_positions", "bias", "sinks")) | {name: [] for name in names}
        given |= {"q": q, "k": [k], "v": [v], "spec": spec}

        def inside() -> Tensor:
            return softmax_forward(given | outer)[0]

        def outside() -> Tensor:
            return behind(softmax_forward(given | {"q": before(q, "q")})[0])

        operations = 2.0 * b * h * t * t * d
    else:
        g, beta = -torch.rand(b, t, h, device=device), torch.rand(b, t, h, device=device)
        optional = ("window_gate", "valid", "state", "window_k", "window_v", "seen", "cu_seqlens")
        given = dict.fromkeys(optional) | {
            "q": q,
            "k": k,
            "v": v,
            "decay": g,
            "beta": beta,
            "feature_q": [],
            "feature_k": [],
        }
        given["spec"] = RECURRENCES["gated delta"].json()

        def inside() -> Tensor:
            return recurrence_forward(given | outer)[0]

        def outside() -> Tensor:
            return behind(recurrence_forward(given | {"q": before(q, "q"), "k": before(k, "k")})[0])

        operations = 2.0 * b * t * h * (4 * d * d + 4 * 64 * d)
    moved = (3 * q.numel() + k.numel() + v.numel()) * q.element_size()
    runs: dict[str, Run] = {"subquad": inside, "around it, compiled": outside}
    return Timing(f"{family} with norms, RoPE and gate", shape, runs, [], float(moved), operations, backward=False)


def softmax_timing(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, window: int = 0) -> Timing:
    """Causal attention, whole or within a window, against SDPA and FlexAttention."""
    b, t, h, hkv, d = shape.batch, shape.tokens, shape.heads, shape.kv_heads, shape.size
    q = torch.randn(b, t, h, d, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(b, t, hkv, d, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = f"(q >= kv) & (q - kv < {window})" if window else "q >= kv"
    text = SoftmaxSpec(d**-0.5, mask=mask).json()
    lists: tuple[list[Tensor], ...] = ([], [], [])

    def ours() -> Tensor:
        return softmax_attention(q, [k], [v], *lists, None, None, None, [], [], text)[0]

    runs: dict[str, Run] = {"subquad": ours}
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if not window:
        grouped = {"enable_gqa": True} if h != hkv else {}
        runs["SDPA"] = lambda: torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, **grouped
        ).transpose(1, 2)  # fmt: skip
    if device.type == "cuda":
        runs["FlexAttention"] = _flex(heads_first, t, window, h != hkv, device)
    pairs = t * (t + 1) / 2 if not window else t * min(window, t)
    element = q.element_size()
    return Timing(
        name, shape, runs, [q, k, v], float((2 * q.numel() + 2 * k.numel()) * element), float(4 * b * h * pairs * d)
    )


def _flex(operands: list[Tensor], tokens: int, window: int, grouped: bool, device: torch.device) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q >= kv) & (q - kv < window) if window else q >= kv

    blocks = create_block_mask(visible, None, None, tokens, tokens, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*operands, block_mask=blocks, enable_gqa=grouped).transpose(1, 2)


def decoding_timing(shape: Shape, prefix: int, device: torch.device, dtype: torch.dtype) -> Timing:
    """One query row per sequence over its own keys, the first `prefix` of which are stored once for the whole batch."""
    b, t, h, hkv, d = shape.batch, shape.tokens, shape.heads, shape.kv_heads, shape.size
    q = torch.randn(b, 1, h, d, device=device, dtype=dtype)
    k, v = (
        [torch.randn(n, s, hkv, d, device=device, dtype=dtype) for n, s in ((1, prefix), (b, t - prefix)) if s]
        for _ in range(2)
    )
    rows = [torch.zeros(b, dtype=torch.int64, device=device), torch.arange(b, device=device)] if prefix else []
    text = SoftmaxSpec(d**-0.5).json()
    empty: tuple[list[Tensor], ...] = ([], [])

    def ours() -> Tensor:
        return softmax_attention(q, k, v, rows, *empty, None, None, None, [], [], text)[0]

    whole = [torch.cat([x.expand(b, -1, -1, -1) for x in side], 1).transpose(1, 2) for side in (k, v)]
    grouped = {"enable_gqa": True} if h != hkv else {}
    runs: dict[str, Run] = {"subquad": ours}
    runs["SDPA"] = lambda: torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *whole, **grouped
    ).transpose(1, 2)
    name = f"decode, {prefix} shared" if prefix else "decode"
    moved = sum(x.numel() for x in (*k, *v)) * q.element_size()
    return Timing(name, shape, runs, [], float(moved), float(4 * b * h * t * d), backward=False)
