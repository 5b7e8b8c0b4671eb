"""Computes the additive recurrence with a window branch by chunks: linear time, batched products, symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.features import features, gate, normalise, repeat_heads
from subquad.kernels.recurrence_by_token import Result
from subquad.kernels.recurrence_layout import arrange, complete
from subquad.kernels.sizes import surely
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec

CHUNK = 64
"""Tokens per chunk; inputs known to be no longer than this are one chunk."""
NEARBY = 32
"""Tokens per chunk of the window branch: shorter chunks share a smaller slab of keys, so fewer masked scores are made."""
MATRIX_COUNT = 32
"""Chunk counts up to which the prefix sum of states is a product with a triangle of ones, which moves less memory than
cumsum.
"""


def supports(spec: RecurrenceSpec) -> bool:
    """True for the axes this form has: causal, no decay, additive update, no window or a window with a shared
    denominator.
    """
    shared = spec.window == 0 or spec.branch == "shared"
    return spec.causal and spec.decay == "none" and spec.update == "add" and spec.sums and shared


def recurrence_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> Result:
    """The operator subquad::recurrence for specs that `supports` admits; O(T (chunk + window)) memory, traceable.

    Let E be the window's history (w slots, oldest first) followed by the T new keys. Token i evicts E[i], its window
    is E[i+1 .. i+w]: chunk c therefore needs the state over E[: cC], the keys E[cC : cC + C] under a triangle
    (linear) and E[cC : cC + C + w] under a band (softmax). With p the softmax over the window, sum_W exp(s - max) is
    1 / max(p). `deep` promises that every row has seen at least sinks + window tokens, which leaves the masks to the
    band alone.
    """
    total, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    dtype = compute_dtype(q)
    layout = arrange(q, k, v, valid, window_k, window_v, seen, spec)
    past, live, keys, values = layout.past, layout.live, layout.keys, layout.values
    chunk: Any = CHUNK
    nearby_chunk: Any = NEARBY
    count: Any = (total + CHUNK - 1) // CHUNK
    if surely(total <= CHUNK):
        chunk = nearby_chunk = total
        count = 1
    elif not isinstance(total, int):
        count = count + 1  # one chunk of padding: a symbolic count of at least 2 needs no guard for the size 1
    span = count * chunk
    nearby_count = count * (CHUNK // NEARBY) if nearby_chunk is not total else 1
    whole = surely(span == total)

    if not whole:
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, span - total)) for x in (keys, values))
    slots = torch.arange(spec.window + span, device=q.device)
    number = past[:, None] - spec.window + slots
    query = layout.q.to(dtype)
    if not whole:
        query = F.pad(query, (0, 0, 0, 0, 0, span - total))

    leaving = features(spec.key_map, repeat_heads(keys[:, :span], heads), feature_k)
    if not (deep and whole and valid is None):
        stays = (number[:, :span] >= spec.sinks) & (slots[:span] < live)
        leaving = leaving * stays[:, None, :, None].to(dtype)
    phi_q = features(spec.feature_map, query.transpose(1, 2), feature_q).unflatten(2, (count, chunk))
    phi_k = leaving.unflatten(2, (count, chunk))
    ones = values.new_ones(*values.shape[:3], 1)
    summed = repeat_heads(torch.cat([values, ones], -1)[:, :span], heads).unflatten(2, (count, chunk))
    before, final = _running(torch.matmul(phi_k.transpose(3, 4), summed), state)
    triangle = torch.matmul(phi_q, phi_k.transpose(3, 4)).tril()
    linear = _plus_product(torch.matmul(phi_q, before), triangle, summed)

    if spec.window == 0:
        out = normalise(linear[..., :-1], linear[..., -1:], spec).flatten(2, 3).transpose(1, 2)
    else:
        sinks_k, sinks_v = layout.sinks_k, layout.sinks_v
        shape = nearby_count, nearby_chunk
        hidden = torch.zeros((), dtype=dtype, device=q.device).masked_fill(
            ~_allowed(number, past, *shape, spec, deep), -torch.inf
        )
        local = _scores(query, keys * spec.scale, sinks_k * spec.scale, hidden, *shape, spec)
        weight = torch.softmax(local, -1)
        log_gamma = gate(window_gate, spec, local)
        if log_gamma.shape[0] > 1:
            log_gamma = log_gamma.view(kv_heads, 1, -1, 1, 1)
        mass = torch.exp(log_gamma) / weight.amax(-1, keepdim=True)
        slab = _slabs(values, sinks_v, *shape, spec).transpose(3, 4)
        nearby = torch.matmul(weight.flatten(3, 4), slab).unflatten(3, (-1, nearby_chunk))
        linear = linear.flatten(2, 3).unflatten(2, shape).unflatten(1, (kv_heads, -1)).transpose(2, 3)
        out = torch.addcmul(linear[..., :-1], nearby, mass) / (mass + linear[..., -1:])
        out = out.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
    out = out[:, :total]
    return complete(layout, out, final, spec)


def _running(added: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk and after the last, from the start state and what each chunk adds [B, H, count, F, V +
    1].
    """
    count = added.shape[2]
    if surely(count == 1):
        start = torch.zeros_like(added) if state is None else state.to(added.dtype)[:, :, None]
        return start, (start + added)[:, :, 0]
    if surely(count <= MATRIX_COUNT):
        strict = torch.ones(count, count, dtype=added.dtype, device=added.device).tril(-1)
        flat = added.flatten(0, 1).flatten(2)
        each = strict.expand(flat.shape[0], -1, -1)
        if state is None:
            sums = torch.bmm(each, flat)
        else:
            start = state.to(added.dtype).flatten(0, 1).flatten(1)[:, None]
            sums = torch.baddbmm(start.expand_as(flat), each, flat)
        before = sums.unflatten(2, added.shape[3:]).unflatten(0, added.shape[:2])
        return before, before[:, :, -1] + added[:, :, -1]
    padded = F.pad(torch.cumsum(added, 2), (0, 0, 0, 0, 1, 0))
    if state is not None:
        padded = padded + state.to(added.dtype)[:, :, None]
    return padded[:, :, :-1], padded[:, :, -1]


def _windows(x: Tensor, count: Any, chunk: Any, spec: RecurrenceSpec) -> Tensor:
    """Overlapping runs of chunk + window tokens, one per chunk: [B, count, .., chunk + window] of x [B, window + count
    * chunk, ..].
    """
    if isinstance(count, int) and count == 1:
        return x.movedim(1, -1).unsqueeze(1)
    return x.unfold(1, spec.window + chunk, chunk)


def _slabs(x: Tensor, sinks: Tensor, count: Any, chunk: Any, spec: RecurrenceSpec) -> Tensor:
    """Per chunk, sinks and local keys side by side: [B, Hkv, count, K, sinks + chunk + window]."""
    local = _windows(x, count, chunk, spec).transpose(1, 2)
    if spec.sinks == 0:
        return local
    fixed = sinks.permute(0, 2, 3, 1)[:, :, None].expand(-1, -1, count, -1, -1)
    return torch.cat([fixed, local], -1)


def _scores(
    query: Tensor, keys: Tensor, sinks: Tensor, hidden: Tensor, count: Any, chunk: Any, spec: RecurrenceSpec
) -> Tensor:
    """Window scores [B, Hkv, count, G, chunk, sinks + chunk + window] of keys and sinks already scaled, plus `hidden`."""
    kv_heads = keys.shape[2]
    rows = query.unflatten(2, (kv_heads, -1)).unflatten(1, (count, chunk)).permute(0, 3, 1, 4, 2, 5)
    slabs = _slabs(keys, sinks, count, chunk, spec)
    start = hidden.expand(*rows.shape[:5], slabs.shape[-1])
    return _plus_product(start.flatten(3, 4), rows.flatten(3, 4), slabs).unflatten(3, (-1, chunk))


def _plus_product(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """start + a @ b of equal batch axes, in one pass over the result."""
    return torch.baddbmm(start.flatten(0, 2), a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


def _allowed(number: Tensor, past: Tensor, count: Any, chunk: Any, spec: RecurrenceSpec, deep: bool) -> Tensor:
    """Bool [1 or B, 1, count or 1, 1, chunk, sinks + chunk + window]: the key is in the row's window, or a sink
    already seen.
    """
    row = torch.arange(chunk, device=number.device)[:, None]
    column = torch.arange(spec.window + chunk, device=number.device)[None, :]
    band = (column > row) & (column <= row + spec.window)
    if deep:
        return F.pad(band, (spec.sinks, 0), value=True)[None, None, None, None]
    known = _windows(number, count, chunk, spec) >= spec.sinks
    local = band & known[:, :, None, :]
    if spec.sinks:
        tokens = past[:, None] + torch.arange(count * chunk, device=number.device)
        sink = torch.arange(spec.sinks, device=number.device) <= tokens.unflatten(1, (count, chunk))[..., None]
        local = torch.cat([sink, local], -1)
    return local[:, None, :, None]
