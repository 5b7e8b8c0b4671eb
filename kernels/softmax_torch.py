"""Writes softmax attention, forward and backward, as plain traceable tensor operations with symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.segments import Segment, check, segments
from subquad.kernels.sizes import guarded, surely
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.state import merge_all
from subquad.kernels.visibility import per_head, predicate_env, query_positions, visibility


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32: the dtype of scores, sums and lse."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def grouped(mask: Tensor, kv_heads: int) -> Tensor:
    """[.., 1 or H, Tq, N] seen as [.., 1 or Hkv, 1 or G, Tq, N]."""
    return mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))


def scores(q: Tensor, k: Tensor, spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scores [B, Hkv, G, Tq, N] of q [B, Tq, H, K] and k [B, N, Hkv, K]: scaled, capped, biased, -inf where not
    visible.
    """
    kv_heads = k.shape[2]
    dtype = compute_dtype(q, k)
    rows = (q.to(dtype) * spec.scale).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    score = torch.matmul(rows, k.to(dtype).permute(0, 2, 3, 1)).unflatten(2, (-1, q.shape[1]))
    if spec.softcap is not None:
        score = spec.softcap * torch.tanh(score / spec.softcap)
    if bias is not None:
        score = score + grouped(bias[(None,) * (4 - bias.dim())].to(dtype), kv_heads)
    return score if visible is None else score.masked_fill(~grouped(visible, kv_heads), -torch.inf)


def dense_state(
    q: Tensor, k: Tensor, v: Tensor, spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(o [B, Tq, H, V], lse [B, Tq, H]) in the compute dtype over these keys, sinks left out; an empty row gives (0,
    -inf).
    """
    score = scores(q, k, spec, visible, bias)
    if guarded(k.shape[1] == 0):
        shape = (*q.shape[:3],)
        return score.new_zeros(*shape, v.shape[3]), score.new_full(shape, -torch.inf)
    top = score.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weight = torch.exp(score - top)
    total = weight.sum(-1, keepdim=True)
    mixed = torch.matmul(weight.flatten(2, 3), v.to(score.dtype).permute(0, 2, 1, 3)).unflatten(2, (-1, q.shape[1]))
    mixed = mixed / torch.where(total == 0, torch.ones_like(total), total)
    lse = (top + torch.log(total)).squeeze(-1)
    return mixed.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)


def finish(
    o: Tensor, lse: Tensor, parts: Sequence[Segment], sinks: Tensor | None, spec: SoftmaxSpec
) -> tuple[Tensor, Tensor]:
    """Add the sinks to a state and give rows without a key the output spec.empty_rows asks for; o in lse's dtype or
    lower.
    """
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
        return o * torch.exp(lse - whole)[..., None], whole
    if spec.empty_rows == "zero":
        return o, lse
    empty = (lse == -torch.inf)[..., None]
    if spec.empty_rows == "nan":
        return torch.where(empty, torch.full_like(o, torch.nan), o), lse
    return torch.where(empty, mean_value(parts, o).to(o.dtype), o), lse


def mean_value(parts: Sequence[Segment], o: Tensor) -> Tensor:
    """Mean [B, 1, H, V] of the live values each query head reads; 0 where none is live."""
    total: Any = 0.0
    count: Any = 0.0
    for part in parts:
        live, dtype = part.live(), compute_dtype(part.v)
        if live is None:
            sums = part.v.sum(1, keepdim=True, dtype=dtype)
            total = total + (sums if part.rows is None or part.shared_by_all else sums.index_select(0, part.rows))
            count = count + part.count
            continue
        shown = live.transpose(1, 2)[..., None].to(dtype)
        count = count + shown.sum(1, keepdim=True)
        if part.shared_by_all:
            total = total + torch.einsum("bn,nhv->bhv", shown[:, :, 0, 0], part.v[0].to(dtype))[:, None]
        else:
            total = total + (part.gathered()[1].to(dtype) * shown).sum(1, keepdim=True)
    if not isinstance(count, Tensor):
        count = torch.scalar_tensor(count, dtype=total.dtype, device=o.device)
    mean: Tensor = total / count.clamp_min(1)
    return mean.repeat_interleave(o.shape[2] // mean.shape[2], 2)


def softmax_attention_torch(
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
    """The operator subquad::softmax_attention in traceable torch: query heads of a KV group folded into rows, O(Tq N)
    memory.
    """
    what = SoftmaxSpec.parse(spec)
    check(q, k, v, rows, lengths, positions)
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    parts = segments(k, v, rows, lengths, positions)
    states = [_segment_state(q, part, what, q_positions, bias, operands, scalars) for part in parts]
    o, lse = merge_all(*zip(*states, strict=True)) if len(states) > 1 else states[0]
    o, lse = finish(o, lse, parts, sinks, what)
    return o.to(q.dtype), lse


def _segment_state(
    q: Tensor, part: Segment, what: SoftmaxSpec, q_positions: Tensor | None, bias: Tensor | None,
    operands: Sequence[Tensor], scalars: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    live = part.live()
    visible = None if live is None else per_head(live, q.shape[2])
    if what.mask is not None:
        query = query_positions(q, q_positions)
        env = predicate_env(what.mask, q.shape[0], q.shape[2], query, part.position(), operands, scalars, part.first)
        visible = visibility(what.mask, env, visible)
    if bias is not None and not surely(bias.shape[3] == 1):
        bias = bias.narrow(3, part.first, part.count)
    if part.shared_by_all:
        return _shared_state(q, part, what, visible, bias)
    return dense_state(q, *part.gathered(), what, visible, bias)


def _shared_state(
    q: Tensor, part: Segment, what: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state of a segment that is stored once: all query rows, as rows of one product."""

    def rows(pairs: Tensor | None) -> Tensor | None:
        """[1 or B, 1 or H, 1 or Tq, N] as [1, 1 or H, B * Tq, N]."""
        if pairs is None:
            return None
        pairs = pairs.expand(q.shape[0], pairs.shape[1], q.shape[1], pairs.shape[3])
        return pairs.transpose(0, 1).flatten(1, 2)[None]

    o, lse = dense_state(q.flatten(0, 1)[None], part.k, part.v, what, rows(visible), rows(bias))
    return o[0].unflatten(0, q.shape[:2]), lse[0].unflatten(0, q.shape[:2])
