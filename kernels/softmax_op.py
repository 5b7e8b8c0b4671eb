"""Registers subquad::softmax_attention with torch: kernel dispatch, fake kernel, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels import softmax_backward
from subquad.kernels.operator_scope import own_precision
from subquad.kernels.provider import provided
from subquad.kernels.segments import check
from subquad.kernels.softmax_cpu import softmax_attention_cpu
from subquad.kernels.softmax_torch import compute_dtype, softmax_attention_torch


def softmax_attention_forward(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
    q_positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    operands: Sequence[Tensor],
    scalars: Sequence[int],
    spec: str,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [B, Tq, H, K] over key/value segments [Bs, Ts, Hkv, K|V] (query head h reads KV head h
    // (H / Hkv)).

    rows: [] or one int64 tensor per segment: [B], the segment row each query row reads (rows that read the same one share
    it); [0], row b reads row b; or page lists [B, 1 or Hkv, P], the segment rows (pages) that each query row, or each KV
    head of it, reads one after the other; -1 is no page. A segment gives a query row Ts slots, or P * Ts. lengths: [] or
    an int64 [B] per segment, its live slots. positions: [] or an int64 [Bs, Ts] per segment, the logical index `kv` of
    each slot; by default slots count on from the live length of the segments before. q_positions: int64 [B, Tq] or None
    for arange. bias: broadcastable to [B, H, Tq, sum of slots], added after scale and softcap. sinks: [H], one more logit
    per head without a value. operands, scalars: the t0.. and s0.. the mask predicate reads. spec: SoftmaxSpec.json().

    Returns o [B, Tq, H, V] in q's dtype and the natural log-sum-exp [B, Tq, H] in fp32 (fp64 for fp64 inputs), sink
    included, -inf for a row without visible key. Page lists have no gradient. Raises ValueError on arguments that do not
    fit.
    """
    arguments = (q, k, v, rows, lengths, positions, q_positions, bias, sinks, operands, scalars, spec)
    with own_precision(q.device.type):
        return _forward(arguments)


def _forward(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q: Tensor = arguments[0]
    if q.device.type == "cpu":
        o, lse = softmax_attention_cpu(*arguments)
    else:
        provider = provided()
        found = (
            None if provider is None else provider("softmax_attention", dict(zip(ARGUMENTS, arguments, strict=True)))
        )
        o, lse = softmax_attention_torch(*arguments) if found is None else found
    return o.contiguous(), lse.contiguous()


softmax_attention = torch.library.custom_op("subquad::softmax_attention", softmax_attention_forward, mutates_args=())

ARGUMENTS = (
    "q",
    "k",
    "v",
    "rows",
    "lengths",
    "positions",
    "q_positions",
    "bias",
    "sinks",
    "operands",
    "scalars",
    "spec",
)


@softmax_attention.register_fake
def _(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
    q_positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    operands: Sequence[Tensor],
    scalars: Sequence[int],
    spec: str,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, rows, lengths, positions)
    shape = q.shape[:3]
    return q.new_empty(*shape, v[0].shape[3]), q.new_empty(shape, dtype=compute_dtype(q))


@torch.library.custom_op("subquad::softmax_attention_backward", mutates_args=())
def softmax_attention_backward(
    grad_o: Tensor,
    grad_lse: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
    q_positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    operands: Sequence[Tensor],
    scalars: Sequence[int],
    spec: str,
    bias_too: bool,
) -> list[Tensor]:
    """Gradients [q, *k, *v, bias if bias_too (with four dimensions), sinks if given] of softmax_attention."""
    arguments = (q, k, v, rows, lengths, positions, q_positions, bias, sinks, operands, scalars, spec)
    provider = provided() if q.device.type != "cpu" else None
    named = dict(zip(ARGUMENTS, arguments, strict=True)) | {"grads": (grad_o, grad_lse, o, lse, bias_too)}
    with own_precision(q.device.type):
        grads = None if provider is None else provider("softmax_attention_backward", named)
        if grads is None:
            given = (grad_o, grad_lse, o, lse, *arguments, bias_too)
            grads = softmax_backward.softmax_attention_backward(*given)
    return [grad.contiguous() for grad in grads]


@softmax_attention_backward.register_fake
def _(
    grad_o: Tensor,
    grad_lse: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
    q_positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    operands: Sequence[Tensor],
    scalars: Sequence[int],
    spec: str,
    bias_too: bool,
) -> list[Tensor]:
    grads = [
        q.new_empty(q.shape),
        *[key.new_empty(key.shape) for key in k],
        *[value.new_empty(value.shape) for value in v],
    ]
    if bias is not None and bias_too:
        grads.append(bias.new_empty((1,) * (4 - bias.dim()) + tuple(bias.shape)))
    if sinks is not None:
        grads.append(sinks.new_empty(sinks.shape))
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    named = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.set_materialize_grads(False)
    ctx.counts = [len(named[name]) for name in ("k", "rows", "lengths", "positions", "operands")]
    ctx.scalars, ctx.spec = named["scalars"], named["spec"]
    ctx.save_for_backward(
        *output, named["q"], named["q_positions"], named["bias"], named["sinks"],
        *named["k"], *named["v"], *named["rows"], *named["lengths"], *named["positions"], *named["operands"],
    )  # fmt: skip


def _backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    o, lse, q, q_positions, bias, sinks, *rest = ctx.saved_tensors
    groups = []
    for count in (ctx.counts[0], *ctx.counts):
        groups.append(rest[:count])
        rest = rest[count:]
    k, v, rows, lengths, positions, operands = groups
    if any(row.dim() == 3 for row in rows):
        raise ValueError(
            "softmax_attention has no gradient through page lists; give the keys as segments with row maps."
        )
    if grad_o is None:
        grad_o = q.new_zeros(*q.shape[:3], v[0].shape[3])
    if grad_lse is None:
        grad_lse = q.new_empty(0)
    bias_too = bias is not None and ctx.needs_input_grad[ARGUMENTS.index("bias")]
    grads = torch.ops.subquad.softmax_attention_backward(
        grad_o, grad_lse, o, lse, q, k, v, rows, lengths, positions, q_positions, bias, sinks, operands, ctx.scalars,
        ctx.spec, bias_too,
    )  # fmt: skip
    dq, dk, dv, extra = (
        grads[0],
        grads[1 : 1 + len(k)],
        grads[1 + len(k) : 1 + 2 * len(k)],
        list(grads[1 + 2 * len(k) :]),
    )
    dbias = extra.pop(0).reshape(bias.shape) if bias is not None and bias_too else None
    dsinks = None if sinks is None else extra.pop(0)
    none = [[None] * len(group) for group in (rows, lengths, positions, operands)]
    return dq, dk, dv, none[0], none[1], none[2], None, dbias, dsinks, none[3], None if ctx.scalars else [], None


softmax_attention.register_autograd(_backward, setup_context=_setup_context)
