"""Computes the window softmax branch of a recurrence over whole sequences: a band of scores, chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.kernels.features import gate
from subquad.kernels.recurrence_layout import Layout
from subquad.kernels.spec import RecurrenceSpec


def window_branch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    shape: tuple[Any, Any],
    spec: RecurrenceSpec,
    deep: bool,
) -> tuple[Tensor, Tensor]:
    """(softmax over each token's window [B, Hkv, n, G, C, V], largest of its weights [.., 1]) for n chunks of C tokens.

    query [B, n C, H, K]; keys and values [B, window + n C, Hkv, K|V] with the window's history in front. `deep` promises
    that every row has seen at least sinks + window tokens, which leaves the masks to the band alone.
    """
    count, chunk = shape
    slots = torch.arange(spec.window + count * chunk, device=query.device)
    number = layout.past[:, None] - spec.window + slots
    hidden = query.new_zeros(()).masked_fill(~_allowed(number, layout.past, count, chunk, spec, deep), -torch.inf)
    scores = _scores(query, keys * spec.scale, layout.sinks_k * spec.scale, hidden, count, chunk, spec)
    weight = torch.softmax(scores, -1)
    slab = _slabs(values, layout.sinks_v, count, chunk, spec).transpose(3, 4)
    near = torch.matmul(weight.flatten(3, 4), slab).unflatten(3, (-1, chunk))
    return near, weight.amax(-1, keepdim=True)


def in_window_order(linear: Tensor, kv_heads: int, shape: tuple[Any, Any]) -> Tensor:
    """Rows [B, H, n C, V] as the window branch orders them, [B, Hkv, n, G, C, V]."""
    return linear.unflatten(2, shape).unflatten(1, (kv_heads, -1)).transpose(2, 3)


def in_token_order(out: Tensor) -> Tensor:
    """[B, Hkv, n, G, C, V] as [B, n C, H, V]."""
    return out.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)


def log_gamma(window_gate: Tensor | None, spec: RecurrenceSpec, like: Tensor) -> Tensor:
    """log gamma that broadcasts over [B, Hkv, n, G, C, V], in like's dtype."""
    found = gate(window_gate, spec, like)
    return found if found.shape[0] == 1 else found.view(like.shape[1], 1, -1, 1, 1)


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
    start = hidden.expand(*rows.shape[:5], slabs.shape[-1]).flatten(3, 4)
    rows = rows.flatten(3, 4)
    joined = torch.baddbmm(start.flatten(0, 2), rows.flatten(0, 2), slabs.flatten(0, 2))
    return joined.unflatten(0, rows.shape[:3]).unflatten(3, (-1, chunk))


def _allowed(number: Tensor, past: Tensor, count: Any, chunk: Any, spec: RecurrenceSpec, deep: bool) -> Tensor:
    """Bool [1 or B, 1, count or 1, 1, chunk, sinks + chunk + window]: the key is in the row's window, or a sink
    already seen.
    """
    row = torch.arange(chunk, device=number.device)[:, None]
    column = torch.arange(spec.window + chunk, device=number.device)[None, :]
    band = (column > row) & (column <= row + spec.window)
    if deep:
        return torch.nn.functional.pad(band, (spec.sinks, 0), value=True)[None, None, None, None]
    known = _windows(number, count, chunk, spec) >= spec.sinks
    local = band & known[:, :, None, :]
    if spec.sinks:
        tokens = past[:, None] + torch.arange(count * chunk, device=number.device)
        sink = torch.arange(spec.sinks, device=number.device) <= tokens.unflatten(1, (count, chunk))[..., None]
        local = torch.cat([sink, local], -1)
    return local[:, None, :, None]
