"""Computes the recurrence of tokens that read all tokens, before and after them: one sum, or two decayed runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.features import features, normalise, repeat_heads
from subquad.kernels.linear_chunks import Chunks, run
from subquad.kernels.recurrence_by_token import Result
from subquad.kernels.recurrence_lanes import NOTHING, chunking, in_lanes, longer
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec


def recurrence_both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor],
    valid: Tensor | None,
    state: Tensor | None,
    seen: Tensor | None,
    spec: RecurrenceSpec,
) -> Result:
    """The operator subquad::recurrence for specs that are not causal; O(T) memory, traceable with symbolic sizes.

    Undecayed, everything is read from one sum (additive weights: a softmax over time per channel, LightNet 2405.21022
    §3.2). Decayed, o_i adds what lies before i, i included, to what lies after it (LION, 2502.16249): the second part is
    the same recurrence over reversed tokens, each key entering one token late and decayed by its own gate.
    """
    dtype, heads = compute_dtype(q), q.shape[2]
    if valid is not None:
        q, k, v = (x.masked_fill(~valid[..., None, None], 0) for x in (q, k, v))
    phi_q = features(spec.feature_map, q.to(dtype).transpose(1, 2), feature_q)
    phi_k = features(spec.key_map, repeat_heads(k.to(dtype), heads), feature_k)
    value = repeat_heads(v.to(dtype), heads)
    if spec.normaliser == "sum":
        value = torch.cat([value, value.new_ones(*value.shape[:3], 1)], -1)
    hidden = None if valid is None else ~valid[:, None, :, None]
    if spec.decay == "additive":
        mixed, final = _softmax_over_time(phi_q, phi_k, value, hidden, state, seen)
    else:
        phi_k = phi_k if hidden is None else phi_k.masked_fill(hidden, 0)
        if decay is None:
            final = torch.matmul(phi_k.transpose(2, 3), value)
            final = final if state is None else final + state
            mixed = torch.matmul(phi_q, final)
        else:
            gates = _gates(decay.to(dtype), phi_q)
            gates = gates if hidden is None else gates.masked_fill(hidden, 0)
            mixed, final = _two_runs(phi_q, phi_k, value, gates, state, spec)
    split = (mixed[..., :-1], mixed[..., -1:]) if spec.normaliser == "sum" else (mixed, mixed[..., :1])
    out = normalise(*split, spec).transpose(1, 2)
    count = torch.full((q.shape[0],), q.shape[1], dtype=torch.int64, device=q.device)
    if valid is not None:
        out = out.masked_fill(~valid[:, :, None, None], 0)
        count = valid.sum(1)
    empty = (k.new_zeros(k.shape[0], 0, *k.shape[2:]), v.new_zeros(v.shape[0], 0, *v.shape[2:]))
    return out, final, *empty, count if seen is None else count + seen


def _gates(decay: Tensor, like: Tensor) -> Tensor:
    """Log decays [B, H, T, 1 or F]."""
    batch, heads, total, _ = like.shape
    if decay.dim() == 1:
        return decay.repeat_interleave(heads // decay.shape[0]).view(1, heads, 1, 1).expand(batch, -1, total, -1)
    return in_lanes(decay, heads) if decay.dim() == 4 else in_lanes(decay, heads)[..., None]


def _softmax_over_time(
    phi_q: Tensor, logs: Tensor, value: Tensor, hidden: Tensor | None, state: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    logs = logs if hidden is None else logs.masked_fill(hidden, NOTHING)
    first = logs.new_full((), NOTHING).expand(*logs.shape[:2], 1, logs.shape[3])
    if state is not None and seen is not None:
        first = torch.where((seen == 0)[:, None, None, None], first, state[..., -1].to(logs.dtype)[:, :, None])
    total = torch.logsumexp(torch.cat([first, logs], 2), 2, keepdim=True)
    shares = torch.exp(logs - total)
    shares = shares if hidden is None else shares.masked_fill(hidden, 0)
    mean = torch.matmul(shares.transpose(2, 3), value)
    if state is not None:
        kept = torch.exp(first - total).masked_fill(first <= NOTHING / 2, 0)
        mean = mean + kept.transpose(2, 3) * state[..., :-1]
    last = total.transpose(2, 3)
    return torch.matmul(phi_q, mean), torch.cat([mean, last.masked_fill(last <= NOTHING / 2, 0)], -1)


def _two_runs(
    phi_q: Tensor, phi_k: Tensor, value: Tensor, gates: Tensor, state: Tensor | None, spec: RecurrenceSpec
) -> tuple[Tensor, Tensor]:
    """What every token reads [B, H, T, V] and the state after the last; both directions are lanes of one run."""
    total = phi_q.shape[2]

    def late(x: Tensor) -> Tensor:
        return F.pad(x.flip(2), (0, 0, 1, 0))[:, :, :total]

    pairs = (
        (phi_q, phi_q.flip(2)),
        (phi_k, late(phi_k * torch.exp(gates))),
        (value, late(value)),
        (gates, late(gates)),
    )
    chunk, count = chunking(total, spec)
    missing = count * chunk - total
    query, key, added, decay = (
        longer(torch.cat(pair), missing, 2).flatten(0, 1).unflatten(1, (count, chunk)) for pair in pairs
    )
    start = None
    if state is not None:
        start = torch.cat([state, torch.zeros_like(state)]).to(value.dtype).flatten(0, 1)
    out, final = run(Chunks(query, key, added, decay, None), start)
    forward, backward = out.flatten(1, 2)[:, :total].unflatten(0, (2, *phi_q.shape[:2])).unbind(0)
    return forward + backward.flip(2), final.unflatten(0, (2, *phi_q.shape[:2]))[0]
