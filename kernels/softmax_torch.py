"""Writes softmax attention, forward and backward, as plain traceable tensor operations with symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.segments import Keys, check, join, per_head, predicate_env, query_positions, visibility
from subquad.kernels.sizes import guarded
from subquad.kernels.spec import SoftmaxSpec


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


def finish(o: Tensor, lse: Tensor, keys: Keys, sinks: Tensor | None, spec: SoftmaxSpec) -> tuple[Tensor, Tensor]:
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
    return torch.where(empty, mean_value(keys, o).to(o.dtype), o), lse


def mean_value(keys: Keys, o: Tensor) -> Tensor:
    """Mean [B, 1, H, V] of the live values each query head reads; 0 where none is live."""
    value = keys.v.to(compute_dtype(keys.v))
    if keys.live is None:
        mean = value.sum(1, keepdim=True) / torch.scalar_tensor(value.shape[1], device=value.device).clamp_min(1)
    else:
        live = keys.live.transpose(1, 2)[..., None].to(value.dtype)
        mean = (value * live).sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp_min(1)
    return mean.repeat_interleave(o.shape[2] // value.shape[2], 2)


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
    keys = join(k, v, rows, lengths, positions)
    env = predicate_env(q.shape[0], q.shape[2], query_positions(q, q_positions), keys.position, operands, scalars)
    visible = visibility(what.mask, env, None if keys.live is None else per_head(keys.live, q.shape[2]))
    o, lse = dense_state(q, keys.k, keys.v, what, visible, bias)
    o, lse = finish(o, lse, keys, sinks, what)
    return o.to(q.dtype), lse
