"""Computes a causal recurrence by chunks, every axis: linear time and memory, batched products, symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.features import features, normalise, repeat_heads
from subquad.kernels.linear_chunks import Chunks, run
from subquad.kernels.recurrence_by_token import Result
from subquad.kernels.recurrence_lanes import CHUNK, additive, chunking, counted, gates_of, in_lanes, longer, ordered
from subquad.kernels.recurrence_layout import arrange, complete
from subquad.kernels.recurrence_window import in_token_order, in_window_order, log_gamma, window_branch
from subquad.kernels.sizes import surely
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec

NEARBY = 32
"""Tokens per chunk of the window branch: shorter chunks share a smaller slab of keys, so fewer masked scores are made."""


def recurrence_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor],
    window_gate: Tensor | None,
    valid: Tensor | None,
    state: Tensor | None,
    window_k: Tensor | None,
    window_v: Tensor | None,
    seen: Tensor | None,
    spec: RecurrenceSpec,
    deep: bool = False,
    gentle: bool = False,
    differentiated: bool = False,
    silent: bool = False,
) -> Result:
    """The operator subquad::recurrence for causal specs; O(T (chunk + window)) memory, traceable unless delta has several
    chunks.

    A shared window delays keys: with E the window's history (w slots, oldest first) followed by the T new keys, token i
    evicts E[i] into the state and sees E[i+1 .. i+w] by softmax. With p that softmax, the window's share of the
    denominator is gamma / max(p). `deep` promises that every row has seen at least sinks + window tokens, which leaves
    the window's masks to the band alone; `gentle`, `differentiated` and `silent` are those of Chunks.
    """
    total, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    dtype = compute_dtype(q)
    if valid is not None:
        hidden = ~valid
        q, k, v = (x.masked_fill(hidden[..., None, None], 0) for x in (q, k, v))
    layout = arrange(q, k, v, valid, window_k, window_v, seen, spec, compact=spec.window > 0)
    if layout.order is not None:
        decay, beta = (ordered(x, layout.order) for x in (decay, beta))
    chunk, count = chunking(total, spec)
    span = count * chunk
    whole = surely(span == total)
    missing = 0 if whole else span - total
    query, keys, values = (longer(x.to(dtype), missing) for x in (layout.q, layout.keys, layout.values))

    delayed = spec.window > 0 and spec.branch == "shared"
    entering = slice(0, span) if delayed else slice(spec.window, None)
    live = counted(layout.live, span, q, whole, valid)
    stays = live
    if delayed and not (deep and live is None):
        number = layout.past[:, None] - spec.window + torch.arange(span, device=q.device)
        stays = number >= spec.sinks if live is None else (number >= spec.sinks) & live
    phi_q = features(spec.feature_map, query.transpose(1, 2), feature_q)
    phi_k = features(spec.key_map, repeat_heads(keys[:, entering], heads), feature_k)
    added = repeat_heads(values[:, entering], heads)
    shape = (count, chunk)
    if decay is not None:
        decay = decay.to(dtype) if decay.dim() == 1 else longer(decay.to(dtype), missing)
    gates = None if decay is None else gates_of(decay, phi_q, shape, live)
    past = None if state is None else state.to(dtype)
    log_mass = None
    if spec.decay == "additive":
        phi_k, gates, log_mass = additive(phi_k, past, seen, live, shape)
        if past is not None and seen is not None:
            past = past[..., :-1].masked_fill((seen == 0)[:, None, None, None], 0)
    elif stays is not None:
        phi_k = phi_k.masked_fill(~stays[:, None, :, None], 0)
    beta = None if beta is None else longer(in_lanes(beta.to(dtype), heads), missing, 2)
    if beta is not None and live is not None:
        beta = beta.masked_fill(~live[:, None, :], 0)

    def linear(columns: Tensor, start: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        def split(x: Tensor) -> Tensor:
            return x.flatten(0, 1).unflatten(1, shape).contiguous()

        rows = None if weight is None else split(weight)[..., None]
        given = None if start is None else start.flatten(0, 1)
        out, last = run(
            Chunks(split(phi_q), split(phi_k), split(columns), gates, rows, gentle, differentiated, silent), given
        )
        return (x.unflatten(0, phi_q.shape[:2]) for x in (out.flatten(1, 2), last))  # type: ignore[return-value]

    ones = added.new_ones(*added.shape[:3], 1)
    if spec.normaliser != "sum":
        numerator, final = linear(added, past, beta)
        denominator = numerator[..., :1]
    elif spec.update == "add":
        joined, final = linear(torch.cat([added, ones], -1), past, None)
        numerator, denominator = joined[..., :-1], joined[..., -1:]
    else:
        numerator, final = linear(added, None if past is None else past[..., :-1], beta)
        denominator, sums = linear(ones, None if past is None else past[..., -1:], None)
        final = torch.cat([final, sums], -1)
    if log_mass is not None:
        final = torch.cat([final, log_mass], -1)

    if silent:
        out = numerator.transpose(1, 2)
    elif spec.window == 0:
        out = normalise(numerator, denominator, spec).transpose(1, 2)
    else:
        near_shape: tuple[Any, Any] = (count * (CHUNK // NEARBY), NEARBY) if chunk == CHUNK else shape
        near, top = window_branch(query, keys, values, layout, near_shape, spec, deep)
        gamma = torch.exp(log_gamma(window_gate, spec, near))
        if spec.branch == "shared":
            mass = gamma / top
            numerator, denominator = (in_window_order(x, kv_heads, near_shape) for x in (numerator, denominator))
            out = torch.addcmul(numerator, near, mass) / (mass + denominator)
        else:
            far = in_window_order(normalise(numerator, denominator, spec), kv_heads, near_shape)
            out = torch.lerp(far, near, gamma.expand_as(near))
        out = in_token_order(out)
    return complete(layout, out if whole else out[:, :total], final, spec)
