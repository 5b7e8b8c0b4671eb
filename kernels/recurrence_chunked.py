"""Computes the undecayed additive recurrence with a window branch by chunks: linear time, batched products, symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from subquad.kernels.features import features, gate, normalise, repeat_heads
from subquad.kernels.recurrence_by_token import Result
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec

CHUNK = 64
"""Tokens per chunk; inputs known to be no longer than this are one chunk."""
MATRIX_COUNT = 32
"""Chunk counts up to which the prefix sum of states is a product with a triangle of ones, which moves less memory than cumsum."""


def supports(spec: RecurrenceSpec) -> bool:
    """True for the axes this form has: causal, no decay, additive update, no window or a window with a shared denominator."""
    shared = spec.window == 0 or spec.branch == "shared"
    return spec.causal and spec.decay == "none" and spec.update == "add" and shared


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

    Let E be the window's history (w slots, oldest first) followed by the T new keys. Token i evicts E[i], its window is E[i+1 .. i+w]:
    chunk c therefore needs the state over E[: cC], the keys E[cC : cC + C] under a triangle (linear) and E[cC : cC + C + w] under a band
    (softmax). With p the softmax over the window, sum_W exp(s - max) is 1 / max(p). `deep` promises that every row has seen at least sinks + window tokens, which leaves the masks to the band alone.
    """
    total, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    dtype = compute_dtype(q)
    order: Tensor | None = None
    live: Any = total
    if valid is not None:
        order = torch.sort((~valid).to(torch.int8), dim=1, stable=True).indices
        q, k, v = (_pick(x, order) for x in (q, k, v))
        live = valid.sum(1)[:, None]
    past = torch.zeros(1, dtype=torch.int64, device=q.device) if seen is None else seen
    chunk: Any = CHUNK
    count: Any = (total + CHUNK - 1) // CHUNK
    if statically_known_true(total <= CHUNK):
        chunk, count = total, 1
    elif not isinstance(total, int):
        count = count + 1  # one chunk of padding: a symbolic count of at least 2 needs no guard for the size 1
    span = count * chunk
    whole = statically_known_true(span == total)

    sink_k, ring_k = _history(window_k, past, k, spec)
    sink_v, ring_v = _history(window_v, past, v, spec)
    keys, values = torch.cat([ring_k, k.to(dtype)], 1), torch.cat([ring_v, v.to(dtype)], 1)
    if not whole:
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, span - total)) for x in (keys, values))
    slots = torch.arange(spec.window + span, device=q.device)
    number = past[:, None] - spec.window + slots
    query = q.to(dtype)
    if not whole:
        query = F.pad(query, (0, 0, 0, 0, 0, span - total))

    leaving = features(spec.feature_map, repeat_heads(keys[:, :span], heads), feature_k)
    if not (deep and whole and valid is None):
        stays = (number[:, :span] >= spec.sinks) & (slots[:span] < live)
        leaving = leaving * stays[:, None, :, None].to(dtype)
    phi_q = features(spec.feature_map, query.transpose(1, 2), feature_q).unflatten(2, (count, chunk))
    phi_k = leaving.unflatten(2, (count, chunk))
    ones = values.new_ones(*values.shape[:3], 1)
    summed = repeat_heads(torch.cat([values, ones], -1)[:, :span], heads).unflatten(2, (count, chunk))
    before, final = _running(torch.matmul(phi_k.transpose(3, 4), summed), state)
    triangle = torch.matmul(phi_q, phi_k.transpose(3, 4)).tril()
    linear = torch.matmul(phi_q, before) + torch.matmul(triangle, summed)

    if spec.window == 0:
        out = normalise(linear[..., :-1], linear[..., -1:], spec).flatten(2, 3).transpose(1, 2)
    else:
        sinks_k, sinks_v = _with_new(sink_k, k, past, spec), _with_new(sink_v, v, past, spec)
        local = _scores(query, keys * spec.scale, sinks_k * spec.scale, count, chunk, spec)
        hidden = torch.zeros((), dtype=dtype, device=q.device).masked_fill(~_allowed(number, past, count, chunk, spec, deep), -torch.inf)
        weight = torch.softmax(local + hidden, -1)
        log_gamma = gate(window_gate, spec, local)
        if log_gamma.shape[0] > 1:
            log_gamma = log_gamma.view(kv_heads, 1, -1, 1, 1)
        mass = torch.exp(log_gamma) / weight.amax(-1, keepdim=True)
        slab = _slabs(values, sinks_v, count, chunk, spec).transpose(3, 4)
        nearby = torch.matmul(weight.flatten(3, 4), slab).unflatten(3, (-1, chunk))
        linear = linear.unflatten(1, (kv_heads, -1)).transpose(2, 3)
        out = torch.addcmul(linear[..., :-1], nearby, mass) / (mass + linear[..., -1:])
        out = out.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
    out = out[:, :total]
    if order is not None and valid is not None:
        back = torch.zeros_like(order).scatter(1, order, torch.arange(total, device=q.device).expand_as(order))
        out = torch.where(valid[:, :, None, None], _pick(out, back), torch.zeros_like(out))
    after = past + (live if order is None else live[:, 0])
    after = after.expand(q.shape[0]).contiguous()
    return out, final, _buffer(keys, sink_k, k, past, after, spec), _buffer(values, sink_v, v, past, after, spec), after


def _running(added: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk and after the last, from the start state and what each chunk adds [B, H, count, F, V + 1]."""
    count = added.shape[2]
    if statically_known_true(count == 1):
        start = torch.zeros_like(added) if state is None else state.to(added.dtype)[:, :, None]
        return start, (start + added)[:, :, 0]
    if statically_known_true(count <= MATRIX_COUNT):
        strict = torch.ones(count + 1, count, dtype=added.dtype, device=added.device).tril(-1)
        flat = added.flatten(0, 1).flatten(2)
        strict = strict.expand(flat.shape[0], -1, -1)
        if state is None:
            sums = torch.bmm(strict, flat)
        else:
            sums = torch.baddbmm(state.to(added.dtype).flatten(0, 1).flatten(1)[:, None], strict, flat)
        sums = sums.unflatten(2, added.shape[3:]).unflatten(0, added.shape[:2])
    else:
        sums = F.pad(torch.cumsum(added, 2), (0, 0, 0, 0, 1, 0))
        if state is not None:
            sums = sums + state.to(added.dtype)[:, :, None]
    return sums[:, :, :-1], sums[:, :, -1]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [B, n] of x [B, T, H, K]."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _history(buffer: Tensor | None, past: Tensor, new: Tensor, spec: RecurrenceSpec) -> tuple[Tensor, Tensor]:
    """Sink slots [B, sinks, ..] and the ring in order of age [B, window, ..], in the compute dtype."""
    dtype = compute_dtype(new)
    if buffer is None:
        shape = (new.shape[0], spec.sinks + spec.window, *new.shape[2:])
        empty = new.new_zeros(shape, dtype=dtype)
        return empty[:, : spec.sinks], empty[:, spec.sinks :]
    buffer = buffer.to(dtype)
    if spec.window == 0:
        return buffer, buffer
    numbers = past[:, None] - spec.window + torch.arange(spec.window, device=new.device)
    return buffer[:, : spec.sinks], _pick(buffer, spec.sinks + (numbers - spec.sinks) % spec.window)


def _with_new(sinks: Tensor, new: Tensor, past: Tensor, spec: RecurrenceSpec) -> Tensor:
    """Sink slots after the new tokens (compacted) have filled those that were still free."""
    if spec.sinks == 0:
        return sinks
    index = torch.arange(spec.sinks, device=new.device)[None, :]
    fresh = (index - past[:, None]).clamp(min=0)
    fresh = fresh.minimum(torch.full_like(fresh, new.shape[1] - 1)).expand(new.shape[0], -1)
    return torch.where((index < past[:, None])[:, :, None, None], sinks, _pick(new, fresh).to(sinks.dtype))


def _windows(x: Tensor, count: Any, chunk: Any, spec: RecurrenceSpec) -> Tensor:
    """Overlapping runs of chunk + window tokens, one per chunk: [B, count, .., chunk + window] of x [B, window + count * chunk, ..]."""
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


def _scores(query: Tensor, keys: Tensor, sinks: Tensor, count: Any, chunk: Any, spec: RecurrenceSpec) -> Tensor:
    """Window scores [B, Hkv, count, G, chunk, sinks + chunk + window] of keys and sinks already scaled."""
    kv_heads = keys.shape[2]
    rows = query.unflatten(2, (kv_heads, -1)).unflatten(1, (count, chunk)).permute(0, 3, 1, 4, 2, 5)
    return torch.matmul(rows.flatten(3, 4), _slabs(keys, sinks, count, chunk, spec)).unflatten(3, (-1, chunk))


def _allowed(number: Tensor, past: Tensor, count: Any, chunk: Any, spec: RecurrenceSpec, deep: bool) -> Tensor:
    """Bool [1 or B, 1, count or 1, 1, chunk, sinks + chunk + window]: the key is in the row's window, or a sink already seen."""
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


def _buffer(joined: Tensor, sinks: Tensor, new: Tensor, past: Tensor, after: Tensor, spec: RecurrenceSpec) -> Tensor:
    """The window buffer [B, sinks + window, Hkv, K] after `after` tokens, in the dtype of `new`; free slots are 0."""
    if spec.window == 0:
        return new.new_zeros(new.shape[0], 0, *new.shape[2:])
    index = torch.arange(spec.window, device=new.device)[None, :]
    number = spec.sinks + index + spec.window * ((after[:, None] - spec.sinks - 1 - index) // spec.window)
    place = (number - past[:, None] + spec.window).clamp(min=0)
    ring = _pick(joined, place) * (number >= spec.sinks)[:, :, None, None].to(joined.dtype)
    if spec.sinks:
        held = torch.arange(spec.sinks, device=new.device)[None, :] < after[:, None]
        first = _with_new(sinks, new, past, spec) * held[:, :, None, None].to(joined.dtype)
        ring = torch.cat([first, ring], 1)
    return ring.to(new.dtype)
