"""Registers subquad::narrow_attention: softmax attention of a few tokens a row, in C++ inside compiled programs."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.kernels.segments import segments
from subquad.kernels.softmax_torch import compute_dtype, dense_state, finish, softmax_attention_torch
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.state import merge_all

C_DECLARATION = (
    "AOTITorchError aoti_torch_cpu_narrow_attention("
    "AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle seen, AtenTensorHandle* sinks, "
    "double scale, double softcap, int64_t empty_rows, AtenTensorHandle* shared_k, AtenTensorHandle* shared_v, "
    "AtenTensorHandle* nodes, AtenTensorHandle* shown, AtenTensorHandle* result)"
)
EMPTY_ROWS = ("nan", "zero", "mean")
"""What `empty_rows` counts: the output of a token that sees no key, see SoftmaxSpec."""


@torch.library.custom_op("subquad::narrow_attention", mutates_args=())
def narrow_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None, scale: float, softcap: float, empty_rows: int,
    shared_k: Tensor | None = None, shared_v: Tensor | None = None, nodes: Tensor | None = None, shown: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Output [B, w, H, V] of softmax attention of q [B, w, H, K] over k [B, S, Hkv, K], v [B, S, Hkv, V], in q's dtype.

    seen: bool [B, w, S], contiguous, which keys a token sees.  sinks: [H] or None.  softcap: 0 for none.  empty_rows: a place in
    EMPTY_ROWS.  The C++ form keeps the queries of a KV head in vector lanes, reads keys and values once, as they are stored,
    for all of them, and sums in fp32: a pass of a few tokens is bound by reading them.  Has no gradient.

    shared_k [N, Hkv, K], shared_v [N, Hkv, V], nodes int64 [n, 5], all or none: what rows have in common beside k and v, stored
    once, see prefix_attention.NODE.  shown: bool [B, w, N], contiguous, which of these slots a token sees as far as nodes name
    them for its row; None for all.
    """
    return narrow_attention_torch(q, k, v, seen, sinks, scale, softcap, empty_rows, shared_k, shared_v, nodes, shown)


@narrow_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None, scale: float, softcap: float, empty_rows: int,
    shared_k: Tensor | None = None, shared_v: Tensor | None = None, nodes: Tensor | None = None, shown: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])


def narrow_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None, scale: float, softcap: float, empty_rows: int,
    shared_k: Tensor | None = None, shared_v: Tensor | None = None, nodes: Tensor | None = None, shown: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The traceable form of narrow_attention; one token of one row becomes sums of products, memory-speed loops in Inductor."""
    cap = None if softcap == 0 else softcap
    if nodes is None and q.shape[0] == 1 and q.shape[1] == 1:
        return _one_token(q, k, v, seen, sinks, SoftmaxSpec(scale, cap, None, EMPTY_ROWS[empty_rows]))  # type: ignore[arg-type]
    spec = SoftmaxSpec(scale, cap, "t0[b, i, j]", EMPTY_ROWS[empty_rows])  # type: ignore[arg-type]
    if shared_k is None or shared_v is None or nodes is None:
        return softmax_attention_torch(q, [k], [v], [], [], [], None, None, sinks, [seen], [], spec.json())[0]
    below = _below(nodes, q.shape[0], shared_k.shape[0])[:, None]
    below = below.expand(-1, q.shape[1], -1) if shown is None else below & shown
    rows = q.flatten(0, 1)[None]
    found = dense_state(rows, shared_k[None], shared_v[None], spec, below.flatten(0, 1)[None, None], None)
    joined = (part[0].unflatten(0, q.shape[:2]) for part in found)
    states = (dense_state(q, k, v, spec, seen[:, None], None), tuple(joined))
    o, lse = merge_all(*zip(*states, strict=True))
    return finish(o, lse, segments([k], [v], [], [], []), sinks, spec)[0].to(q.dtype)


def _below(nodes: Tensor, batch: int, slots: int) -> Tensor:
    """Bool [B, N]: the slots of the nodes above each row."""
    slot, length, _, first, count = nodes.unbind(1)
    rows, places = (torch.arange(size, device=nodes.device) for size in (batch, slots))
    reads = (rows >= first[:, None]) & (rows < (first + count)[:, None])
    holds = (places >= slot[:, None]) & (places < (slot + length)[:, None])
    return (reads[:, :, None] & holds[:, None]).any(0)


def _one_token(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    """Heads of a KV group are folded into rows; sums of products throughout, in fp32 (fp64)."""
    wide = compute_dtype(q)
    kv_heads = k.shape[2]
    rows = (_made_real(q).to(wide) * spec.scale).unflatten(2, (kv_heads, -1))
    score = (rows * k.unsqueeze(3)).sum(-1, dtype=wide)
    if spec.softcap is not None:
        score = spec.softcap * torch.tanh(score / spec.softcap)
    score = score.masked_fill(~seen[:, 0, :, None, None], -torch.inf)
    top = score.amax(1, keepdim=True)
    if sinks is not None:
        extra = sinks.to(wide).view(1, 1, kv_heads, -1)
        top = torch.maximum(top, extra)
    if spec.empty_rows != "nan":
        top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weight = torch.exp(score - top)
    total = weight.sum(1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(extra - top)
    elif spec.empty_rows == "zero":
        total = torch.where(total == 0, torch.ones_like(total), total)
    mixed = ((weight / total).unsqueeze(-1) * v.unsqueeze(3)).sum(1, dtype=wide)
    if sinks is None and spec.empty_rows == "mean":
        mean = v.to(wide).mean(1)[:, :, None]
        mixed = torch.where((total[:, 0] == 0)[..., None], mean, mixed)
    return mixed.flatten(1, 2).unsqueeze(1).to(q.dtype)


def _made_real(x: Tensor) -> Tensor:
    """x itself; Inductor stores it before its readers run, instead of computing it again in each of them."""
    return torch.as_strided(x, x.shape, x.stride())
