"""Arranges the tokens of a windowed recurrence (padding out, history in front, sinks aside) and undoes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.recurrence_by_token import Result
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec


@dataclass(frozen=True)
class Layout:
    """q, k, v with valid tokens first; keys and values [B, window + T, Hkv, *]: window history (oldest first), then
    the tokens.

    sinks_k, sinks_v [B, sinks, Hkv, *] after the tokens filled free slots; past [1 or B] valid tokens before; live:
    valid tokens of each row, T or [B, 1], or `valid` itself where they were not brought to the front; order [B, T] where
    they were, and valid [B, T] where there was padding. keys, values and sinks are in the compute dtype.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    sinks_k: Tensor
    sinks_v: Tensor
    past: Tensor
    live: Any
    order: Tensor | None
    valid: Tensor | None


def arrange(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    window_k: Tensor | None,
    window_v: Tensor | None,
    seen: Tensor | None,
    spec: RecurrenceSpec,
    compact: bool = True,
) -> Layout:
    """The layout of these tokens after the given window buffers; traceable. Unless `compact`, valid tokens stay where
    they are.
    """
    order: Tensor | None = None
    live: Any = q.shape[1]
    if valid is not None and not compact:
        live = valid
    elif valid is not None:
        order = torch.sort((~valid).to(torch.int8), dim=1, stable=True).indices
        q, k, v = (pick(x, order) for x in (q, k, v))
        live = valid.sum(1)[:, None]
    past = torch.zeros(1, dtype=torch.int64, device=q.device) if seen is None else seen
    dtype = compute_dtype(q)
    sink_k, ring_k = _history(window_k, past, k, spec)
    sink_v, ring_v = _history(window_v, past, v, spec)
    keys, values = k.to(dtype), v.to(dtype)
    if spec.window:
        keys, values = torch.cat([ring_k, keys], 1), torch.cat([ring_v, values], 1)
    sinks_k, sinks_v = _with_new(sink_k, k, past, spec), _with_new(sink_v, v, past, spec)
    return Layout(q, k, v, keys, values, sinks_k, sinks_v, past, live, order, valid)


def complete(layout: Layout, out: Tensor, state: Tensor, spec: RecurrenceSpec) -> Result:
    """The operator's outputs from out [B, T, H, V] in the layout's order and the final state."""
    order, valid, past = layout.order, layout.valid, layout.past
    after = past + (layout.live if valid is None else valid.sum(1))
    if order is not None:
        back = torch.zeros_like(order).scatter(1, order, torch.arange(out.shape[1], device=out.device).expand_as(order))
        out = pick(out, back)
    if valid is not None:
        out = out.masked_fill(~valid[:, :, None, None], 0)
    after = after.expand(out.shape[0]).contiguous()
    window_k = _buffer(layout.keys, layout.sinks_k, layout.k, past, after, spec)
    return out, state, window_k, _buffer(layout.values, layout.sinks_v, layout.v, past, after, spec), after


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [B, n] of x [B, T, H, K]."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _history(buffer: Tensor | None, past: Tensor, new: Tensor, spec: RecurrenceSpec) -> tuple[Tensor, Tensor]:
    """Sink slots [B, sinks, ..] and the ring in order of age [B, window, ..], in the compute dtype."""
    dtype = compute_dtype(new)
    if spec.window == 0:
        empty = new.new_zeros(new.shape[0], 0, *new.shape[2:], dtype=dtype)
        return empty, empty
    if buffer is None:
        shape = (new.shape[0], spec.sinks + spec.window, *new.shape[2:])
        empty = new.new_zeros(shape, dtype=dtype)
        return empty[:, : spec.sinks], empty[:, spec.sinks :]
    buffer = buffer.to(dtype)
    numbers = past[:, None] - spec.window + torch.arange(spec.window, device=new.device)
    return buffer[:, : spec.sinks], pick(buffer, spec.sinks + (numbers - spec.sinks) % spec.window)


def _with_new(sinks: Tensor, new: Tensor, past: Tensor, spec: RecurrenceSpec) -> Tensor:
    """Sink slots after the new tokens (compacted) have filled those that were still free."""
    if spec.sinks == 0:
        return sinks
    index = torch.arange(spec.sinks, device=new.device)[None, :]
    fresh = (index - past[:, None]).clamp(min=0)
    fresh = fresh.minimum(torch.full_like(fresh, new.shape[1] - 1)).expand(new.shape[0], -1)
    return torch.where((index < past[:, None])[:, :, None, None], sinks, pick(new, fresh).to(sinks.dtype))


def _buffer(joined: Tensor, sinks: Tensor, new: Tensor, past: Tensor, after: Tensor, spec: RecurrenceSpec) -> Tensor:
    """The window buffer [B, sinks + window, Hkv, K] after `after` tokens, in the dtype of `new`; free slots are 0."""
    if spec.window == 0:
        return new.new_zeros(new.shape[0], 0, *new.shape[2:])
    index = torch.arange(spec.window, device=new.device)[None, :]
    number = spec.sinks + index + spec.window * ((after[:, None] - spec.sinks - 1 - index) // spec.window)
    place = (number - past[:, None] + spec.window).clamp(min=0)
    ring = pick(joined, place) * (number >= spec.sinks)[:, :, None, None].to(joined.dtype)
    if spec.sinks:
        held = torch.arange(spec.sinks, device=new.device)[None, :] < after[:, None]
        first = sinks * held[:, :, None, None].to(joined.dtype)
        ring = torch.cat([first, ring], 1)
    return ring.to(new.dtype)
