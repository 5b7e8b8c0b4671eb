"""Computes the gradients of softmax attention by recomputing its weights, a block of query rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.segments import join, split
from subquad.kernels.softmax_torch import compute_dtype, scores
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.visibility import per_head, predicate_env, query_positions, visibility

ROWS = 512
"""Query rows handled at once; memory is O(ROWS * keys)."""


def softmax_attention_backward(
    grad_o: Tensor,
    grad_lse: Tensor,
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
) -> list[Tensor]:
    """Gradients [q, *k, *v, bias if given, sinks if given] for grad_o [B, Tq, H, V] and grad_lse [B, Tq, H] (or [0] for none).

    dS = P * (dP - rowsum(P * dP) + dlse), the identity of FlashAttention (2205.14135) with the log-sum-exp as a
    second output.
    """
    what = SoftmaxSpec.parse(spec)
    keys = join(k, v, rows, lengths, positions)
    query = query_positions(q, q_positions)
    dtype = compute_dtype(q)
    kv_heads = keys.k.shape[2]
    key, value = (x.to(dtype).permute(0, 2, 1, 3) for x in (keys.k, keys.v))
    dq = torch.zeros_like(q, dtype=dtype)
    dk, dv = torch.zeros_like(key), torch.zeros_like(value)
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    dbias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
    dsinks = None if sinks is None else torch.zeros(kv_heads, q.shape[2] // kv_heads, dtype=dtype, device=q.device)
    for start in range(0, q.shape[1], ROWS):
        part = slice(start, min(start + ROWS, q.shape[1]))
        env = predicate_env(what.mask or "True", q.shape[0], q.shape[2], query, keys.position, operands, scalars)
        env |= {name: env[name][:, :, part] for name in ("q", "i") if name in env}
        local_bias = None if bias is None else (bias[:, :, part] if bias.shape[2] > 1 else bias)
        visible = visibility(what.mask, env, None if keys.live is None else per_head(keys.live, q.shape[2]))
        score = scores(q[:, part], keys.k, what, visible, local_bias)
        if sinks is not None:
            sink = sinks.to(dtype).view(1, kv_heads, -1, 1, 1).expand(*score.shape[:4], 1)
            lse = torch.logaddexp(torch.logsumexp(score, -1, keepdim=True), sink)
        else:
            lse = torch.logsumexp(score, -1, keepdim=True)
        empty = lse == -torch.inf
        weight = torch.exp(score - lse.masked_fill(empty, 0.0))
        go = grad_o[:, part].to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        gl = torch.zeros_like(lse)
        if grad_lse.numel():
            gl = (
                grad_lse[:, part]
                .to(dtype)
                .unflatten(2, (kv_heads, -1))
                .permute(0, 2, 3, 1)[..., None]
                .masked_fill(empty, 0.0)
            )
        dweight = torch.matmul(go.flatten(2, 3), value.transpose(2, 3)).view_as(weight)
        shift = gl - (weight * dweight).sum(-1, keepdim=True)
        dscore = weight * (dweight + shift)
        if what.empty_rows == "mean" and sinks is None:
            live = (
                torch.ones_like(score[:, :1, :1, :1]) if keys.live is None else keys.live[:, :, None, None, :].to(dtype)
            )
            weight = torch.where(empty, live / live.sum(-1, keepdim=True).clamp_min(1), weight)
        dv += torch.matmul(weight.flatten(2, 3).transpose(2, 3), go.flatten(2, 3))
        if dsinks is not None:
            dsinks += (torch.exp(sink - lse) * shift).sum((0, 3, 4))
        if dbias is not None:
            _accumulate(dbias, dscore, part)
        if what.softcap is not None:
            dscore = dscore * _softcap_slope(q[:, part], keys.k, what)
        dscore = (dscore * what.scale).flatten(2, 3)
        row = q[:, part].to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        dk += torch.matmul(dscore.transpose(2, 3), row)
        dq[:, part] = (
            torch.matmul(dscore, key).unflatten(2, (-1, part.stop - part.start)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        )
    grads = [dq.to(q.dtype), *split(dk.transpose(1, 2), k, rows), *split(dv.transpose(1, 2), v, rows)]
    if bias is not None and dbias is not None:
        grads.append(dbias.to(bias.dtype))
    if sinks is not None and dsinks is not None:
        grads.append(dsinks.flatten().to(sinks.dtype))
    return grads


def _softcap_slope(q: Tensor, k: Tensor, spec: SoftmaxSpec) -> Tensor:
    assert spec.softcap is not None
    capped = scores(q, k, spec, None, None)
    return 1 - (capped / spec.softcap) ** 2


def _accumulate(dbias: Tensor, dscore: Tensor, part: slice) -> None:
    """Add dscore [B, Hkv, G, rows, N], summed over the dimensions along which the bias was broadcast."""
    full = dscore.flatten(1, 2)
    target = dbias[:, :, part] if dbias.shape[2] > 1 else dbias
    for dim in range(4):
        if target.shape[dim] == 1 and full.shape[dim] != 1:
            full = full.sum(dim, keepdim=True)
    target += full
