"""Runs softmax attention on CPU by the fastest torch form for its size and mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.evaluation import evaluate
from subquad.kernels.expression import parse
from subquad.kernels.intervals import block_tests
from subquad.kernels.segments import Keys, check, join, per_head, predicate_env, query_positions, visibility
from subquad.kernels.softmax_torch import compute_dtype, dense_state, finish
from subquad.kernels.spec import SoftmaxSpec

BLOCK = 128
"""Rows and columns of a block of the block-wise form."""
FOLD_ROWS = 64
"""Query rows per KV group up to which the group's heads are folded into rows."""
DENSE_PAIRS = 256 * 256
"""Query-key pairs up to which one dense call is made."""


def softmax_attention_cpu(
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
    """The operator subquad::softmax_attention on CPU; not traceable (it looks at sizes and mask values)."""
    what = SoftmaxSpec.parse(spec)
    check(q, k, v, rows, lengths, positions)
    keys = _trim(join(k, v, rows, lengths, positions), lengths)
    query = query_positions(q, q_positions)
    plain = q_positions is None and not positions and keys.live is None and q.shape[1] == keys.k.shape[1]
    if (
        what.mask == "q >= kv"
        and plain
        and bias is None
        and what.softcap is None
        and q.shape[1] > 1
        and _has_flash(q, keys)
    ):
        o, lse = _flash(q, keys.k, keys.v, what, None, causal=True)
    else:
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())]
            bias = bias[..., : keys.k.shape[1]] if bias.shape[3] > 1 else bias
        env = predicate_env(q.shape[0], q.shape[2], query, keys.position, operands, scalars)
        pairs = q.shape[1] * keys.k.shape[1]
        if pairs <= DENSE_PAIRS or q.shape[1] <= 1 or (what.mask is None and what.softcap is None):
            o, lse = _state(q, keys.k, keys.v, what, visibility(what.mask, env, _seen(keys, q.shape[2])), bias)
        else:
            o, lse = _blocks(q, keys, what, env, bias)
    o, lse = finish(o, lse, keys, sinks, what)
    return o.to(q.dtype), lse


def _trim(keys: Keys, lengths: Sequence[Tensor]) -> Keys:
    """Cut a single segment to its longest live length, and forget liveness where every remaining slot is live."""
    if keys.live is None:
        return keys
    k, v, position, live = keys.k, keys.v, keys.position, keys.live
    if len(lengths) == 1:
        longest = int(lengths[0].max()) if lengths[0].numel() else 0
        k, v, position, live = k[:, :longest], v[:, :longest], position[..., :longest], live[..., :longest]
    return Keys(k, v, position, None if bool(live.all()) else live)


def _seen(keys: Keys, heads: int) -> Tensor | None:
    return None if keys.live is None else per_head(keys.live, heads)


def _has_flash(q: Tensor, keys: Keys) -> bool:
    return (
        q.shape[3] == keys.v.shape[3]
        and keys.k.shape[1] > 0
        and q.numel() > 0
        and q.dtype == keys.k.dtype == keys.v.dtype
    )


def _state(
    q: Tensor, k: Tensor, v: Tensor, spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if spec.softcap is not None or not _has_flash(q, Keys(k, v, k, None)):
        return dense_state(q, k, v, spec, visible, bias)
    if visible is not None and bool(visible.all()):
        visible = None
    additive = bias
    if visible is not None:
        dtype = compute_dtype(q)
        additive = torch.zeros((), dtype=dtype) if bias is None else bias.to(dtype)
        additive = torch.where(visible, additive, torch.scalar_tensor(-torch.inf, dtype=dtype))
    elif bias is not None:
        additive = bias.to(compute_dtype(q))
    return _flash(q, k, v, spec, additive, causal=False)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, spec: SoftmaxSpec, additive: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    folded = not causal and group > 1 and q_len * group <= FOLD_ROWS
    if folded:
        q = q.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(batch, kv_heads, q_len * group, width)
        if additive is not None:
            additive = _fold(additive, kv_heads, group, q_len)
    else:
        q = q.transpose(1, 2)
    if additive is not None:
        additive = (
            additive.expand(batch, -1, q.shape[2], k.shape[1])
            if additive.shape[2] == 1
            else additive.expand(batch, -1, -1, k.shape[1])
        )
    q, keys, values = (_dense(x) for x in (q, k.transpose(1, 2), v.transpose(1, 2)))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, causal, attn_mask=additive, scale=spec.scale
    )
    if additive is not None:
        empty = (additive.amax(-1) == -torch.inf).expand(batch, q.shape[1], q.shape[2])
        lse = lse.masked_fill(empty, -torch.inf)
        o = o.masked_fill(empty[..., None], 0.0)
    lse = lse.to(compute_dtype(q))
    if folded:
        o = o.unflatten(2, (q_len, group)).transpose(1, 2).flatten(2, 3)
        return o, lse.unflatten(2, (q_len, group)).transpose(1, 2).flatten(2, 3)
    return o.transpose(1, 2), lse.transpose(1, 2)


def _dense(operand: Tensor) -> Tensor:
    """The operand with the numbers of one head side by side, which the kernel takes for granted and does not check."""
    return operand if operand.stride(-1) == 1 or operand.shape[-1] == 1 else operand.contiguous()


def _fold(additive: Tensor, kv_heads: int, group: int, q_len: int) -> Tensor:
    """[.., 1 or H, 1 or Tq, N] as [.., 1 or Hkv, 1 or Tq * G, N], query first, head of the group second."""
    if additive.shape[1] == 1:
        return additive if additive.shape[2] == 1 else additive.repeat_interleave(group, 2)
    per_head = additive.expand(-1, -1, q_len, -1).unflatten(1, (kv_heads, group))
    return per_head.transpose(2, 3).flatten(2, 3)


def _blocks(
    q: Tensor, keys: Keys, spec: SoftmaxSpec, env: dict[str, Any], bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows in blocks, each over the key blocks its mask may touch; blocks wholly visible go without a mask."""
    q_len, k_len = q.shape[1], keys.k.shape[1]
    maybe, always = _block_map(spec, env, q_len, k_len)
    o = q.new_empty(*q.shape[:3], keys.v.shape[3], dtype=q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    for index in range(maybe.shape[0]):
        rows = slice(index * BLOCK, min(q_len, (index + 1) * BLOCK))
        runs = _runs(maybe[index].tolist(), k_len)
        k, v = _take(keys.k, runs, 1), _take(keys.v, runs, 1)
        part_bias = bias
        if bias is not None:
            part_bias = bias[:, :, rows] if bias.shape[2] > 1 else bias
            part_bias = _take(part_bias, runs, 3) if bias.shape[3] > 1 else part_bias
        visible = None
        if keys.live is not None or not bool(always[index][maybe[index]].all()):
            local = env | {name: env[name][:, :, rows] for name in ("q", "i")}
            local |= {name: _take(env[name], runs, 3) for name in ("kv", "j")}
            seen = _seen(keys, q.shape[2])
            visible = visibility(spec.mask, local, None if seen is None else _take(seen, runs, 3))
        o[:, rows], lse[:, rows] = _state(q[:, rows], k, v, spec, visible, part_bias)
    return o, lse


def _runs(touched: list[bool], length: int) -> list[slice]:
    runs: list[slice] = []
    for block, touch in enumerate(touched):
        if not touch:
            continue
        start, stop = block * BLOCK, min(length, (block + 1) * BLOCK)
        if runs and runs[-1].stop == start:
            runs[-1] = slice(runs[-1].start, stop)
        else:
            runs.append(slice(start, stop))
    return runs


def _take(tensor: Tensor, runs: list[slice], dim: int) -> Tensor:
    parts = [tensor.narrow(dim, run.start, run.stop - run.start) for run in runs]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)


def _bounds(index: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value [.., blocks] of index [.., length] in blocks of BLOCK."""
    blocks = -(-length // BLOCK)
    padded = torch.cat([index, index[..., -1:].expand(*index.shape[:-1], blocks * BLOCK - length)], -1)
    grouped = padded.unflatten(-1, (blocks, BLOCK))
    return grouped.amin(-1), grouped.amax(-1)


def _block_map(spec: SoftmaxSpec, env: dict[str, Any], q_len: int, k_len: int) -> tuple[Tensor, Tensor]:
    shape = (-(-q_len // BLOCK), -(-k_len // BLOCK))
    if spec.mask is None:
        return torch.ones(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    bounds: dict[str, Tensor] = {}
    for name in ("q", "i"):
        low, high = _bounds(env[name].squeeze(3), q_len)
        bounds |= {f"{name}_lo": low[..., None], f"{name}_hi": high[..., None]}
    for name in ("kv", "j"):
        low, high = _bounds(env[name].squeeze(2), k_len)
        bounds |= {f"{name}_lo": low[:, :, None], f"{name}_hi": high[:, :, None]}
    maybe_text, always_text = block_tests(spec.mask)
    results = []
    for text in (maybe_text, always_text):
        needed = parse(text, "test").names
        value = evaluate(text, {name: item for name, item in (env | bounds).items() if name in needed}, "test")
        results.append(
            torch.as_tensor(value).expand(*torch.broadcast_shapes(torch.as_tensor(value).shape, (1, 1, *shape)))
        )
    return results[0].flatten(0, 1).any(0), results[1].flatten(0, 1).all(0)
