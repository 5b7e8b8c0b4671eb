"""Computes the window recurrence over whole sequences for training: products in the inputs' dtype, sums in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.features import features
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec

MINIMUM_CHUNK = 32


def trains(spec: RecurrenceSpec) -> bool:
    """True for the axes this form has: causal, additive, undecayed, a window under a shared denominator."""
    plain = spec.causal and spec.decay == "none" and spec.update == "add" and spec.normaliser == "sum"
    return plain and spec.window > 0 and spec.branch == "shared"


def recurrence_training(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor],
    window_gate: Tensor | None,
    spec: RecurrenceSpec,
) -> Tensor:
    """o [B, T, H, V] of subquad::recurrence without state, padding or packing, for a spec that `trains` admits.

    q [B, T, H, K], k and v [B, T, Hkv, K|V]; feature_q, feature_k and window_gate as the operator takes them, in fp32.
    Differs from the operator by the rounding of half-precision products alone, and keeps only O(T (chunk + window)) values
    for the backward. Traceable at fixed sizes. Chunks are at least one window long, so that every window lies in its chunk
    and the one before; what left the window before that is in the running state.
    """
    total, heads = q.shape[1], q.shape[2]
    dtype, wide = q.dtype, compute_dtype(q)
    chunk = max(spec.window, MINIMUM_CHUNK)
    count = -(-total // chunk)
    sinks = min(spec.sinks, total)
    group = heads // k.shape[2]
    query, key, value = (F.pad(x.transpose(1, 2), (0, 0, 0, count * chunk - total)) for x in (q, k, v))
    if group > 1:
        key, value = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value))
    value = torch.cat([value, torch.ones_like(value[..., :1])], -1)

    rows = query.unflatten(2, (count, chunk))
    row = torch.arange(chunk, device=q.device)[:, None]
    column = torch.arange(2 * chunk, device=q.device)[None]
    first = torch.arange(count, device=q.device)[:, None, None] * chunk
    age = row + chunk - column
    inside = (age >= 0) & (age < spec.window) & (first + column >= chunk)
    scores = torch.matmul(rows, _pairs(key, count).transpose(-1, -2)).to(wide) * spec.scale
    scores = scores.masked_fill(~inside, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    sink_scores: Tensor | None = None
    if sinks:
        apart = first + row - torch.arange(sinks, device=q.device) >= spec.window
        sink_scores = torch.matmul(query, key[:, :, :sinks].transpose(-1, -2)).to(wide).unflatten(2, (count, chunk))
        sink_scores = (sink_scores * spec.scale).masked_fill(~apart, -torch.inf)
        top = torch.maximum(top, sink_scores.amax(-1, keepdim=True))
    gamma = 1.0 if window_gate is None else torch.sigmoid(window_gate.to(wide)).view(-1, 1, 1, 1)

    phi_q = features(spec.feature_map, _in(query, feature_q), _cast(feature_q, query)).to(dtype)
    phi_k = features(spec.key_map, _in(key, feature_k), _cast(feature_k, key)).to(dtype)
    if sinks:
        phi_k = F.pad(phi_k[:, :, sinks:], (0, 0, sinks, 0))
    phi_q, chunks_k = phi_q.unflatten(2, (count, chunk)), phi_k.unflatten(2, (count, chunk))
    left = age >= spec.window
    if chunk == spec.window:
        near = torch.matmul(phi_q, _before(chunks_k, 1).transpose(-1, -2)).to(wide)
        near = F.pad(near * left[:, :chunk], (0, chunk))
    else:
        near = torch.matmul(phi_q, _pairs(phi_k, count).transpose(-1, -2)).to(wide) * left
    weights = ((scores - top).exp() * gamma + near).to(dtype)
    added = torch.matmul(chunks_k.transpose(-1, -2), value.unflatten(2, (count, chunk)))
    state = _before(added.to(wide).cumsum(2), 2)
    mixed = torch.matmul(weights, _pairs(value, count)).to(wide) + torch.matmul(phi_q, state.to(dtype)).to(wide)
    if sink_scores is not None:
        sink_weights = ((sink_scores - top).exp() * gamma).to(dtype)
        mixed = mixed + torch.matmul(sink_weights, value[:, :, None, :sinks]).to(wide)
    out = (mixed[..., :-1] / mixed[..., -1:]).to(dtype)
    return out.flatten(2, 3)[:, :, :total].transpose(1, 2)


def _cast(weights: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    return [weight.to(like.dtype) for weight in weights]


def _in(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The rows that the feature map reads; a map without weights is evaluated in the compute dtype."""
    return x if weights else x.to(compute_dtype(x))


def _before(chunks: Tensor, shift: int) -> Tensor:
    """[B, H, N, ..] moved `shift` chunks later, zeros in front."""
    return F.pad(chunks, (0, 0, 0, 0, shift, 0))[:, :, : chunks.shape[2]]


def _pairs(x: Tensor, count: int) -> Tensor:
    """[B, H, N * C, K] as [B, H, N, 2 C, K]: every chunk with the one before it."""
    chunks = x.unflatten(2, (count, -1))
    return torch.cat([_before(chunks, 1), chunks], 3)
