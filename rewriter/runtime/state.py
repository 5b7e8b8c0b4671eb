"""The state that one decoding call carries: its tokens, growing key/value segments and recurrent states."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.layout import DecoderLayout, SiteState

GRAIN = 256
"""Buffers grow to a multiple of this many slots, at least by half."""


@dataclass
class Segment:
    """Keys and values of some tokens for every KV site.

    k, v: one [Bs, capacity, Hkv, K|V] per KV site.  rows: int64 [B], the segment row each batch row reads (None: its own).
    lengths: int64 [B] live slots per row (None: the state's length).  positions: int64 [Bs, capacity], the column each slot
    holds (None: slot s holds column s).  A chain of tokens is one segment with all three None.
    """

    k: list[Tensor]
    v: list[Tensor]
    rows: Tensor | None = None
    lengths: Tensor | None = None
    positions: Tensor | None = None


@dataclass
class DecoderState:
    """State of one sequence batch; belongs to one caller and is not shared between threads.

    length: columns so far.  tokens: per token input an int64 buffer [B, capacity].  segments: KV of all sites, the last one
    grows.  recurrent: per recurrent site (state, window_k, window_v, seen).  checkpoints: (length, recurrent) after earlier
    calls, newest last, for rollback.
    """

    batch: int
    device: torch.device
    tokens: dict[str, Tensor]
    segments: list[Segment]
    recurrent: list[tuple[Tensor, ...]]
    arange: Tensor
    length: int = 0
    checkpoints: list[tuple[int, list[tuple[Tensor, ...]]]] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Columns that fit before the buffers grow."""
        return int(self.arange.shape[0])

    def bytes(self) -> int:
        """Bytes of keys, values and recurrent states that are live now."""
        kv = sum(
            t.numel() // max(1, t.shape[1]) * self.length * t.element_size()
            for s in self.segments
            for t in (*s.k, *s.v)
        )
        return kv + sum(t.numel() * t.element_size() for site in self.recurrent for t in site)


CHECKPOINTS = 4
"""Recurrent states of this many calls are kept; a rollback further than that replays the tokens."""


def new_state(layout: DecoderLayout, batch: int, capacity: int, device: torch.device) -> DecoderState:
    """An empty state for `batch` rows with room for `capacity` columns."""
    capacity = max(GRAIN, -(-capacity // GRAIN) * GRAIN)
    tokens = {name: torch.zeros(batch, capacity, dtype=torch.int64, device=device) for name in layout.inputs}
    kv = [site for site in layout.sites if site.kind == "kv"]
    k = [torch.zeros(batch, capacity, s.kv_heads, s.key_dim, dtype=s.dtype, device=device) for s in kv]
    v = [torch.zeros(batch, capacity, s.kv_heads, s.value_dim, dtype=s.dtype, device=device) for s in kv]
    recurrent = [empty_recurrence(s, batch, device) for s in layout.sites if s.kind == "recurrent"]
    return DecoderState(batch, device, tokens, [Segment(k, v)], recurrent, torch.arange(capacity, device=device))


def empty_recurrence(site: SiteState, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """The initial (state, window_k, window_v, seen) of a recurrent site."""
    wide = torch.float64 if site.dtype == torch.float64 else torch.float32
    return (
        torch.zeros(batch, site.heads, site.features, site.value_dim + site.sums, dtype=wide, device=device),
        torch.zeros(batch, site.window, site.kv_heads, site.key_dim, dtype=site.dtype, device=device),
        torch.zeros(batch, site.window, site.kv_heads, site.value_dim, dtype=site.dtype, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def reserve(state: DecoderState, columns: int) -> bool:
    """Grow the buffers so that `columns` columns fit; True when tensors were replaced."""
    if columns <= state.capacity:
        return False
    capacity = -(-max(columns, state.capacity * 3 // 2) // GRAIN) * GRAIN
    grow = capacity - state.capacity
    state.tokens = {name: torch.nn.functional.pad(t, (0, grow)) for name, t in state.tokens.items()}
    last = state.segments[-1]
    last.k = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, grow)) for t in last.k]
    last.v = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, grow)) for t in last.v]
    state.arange = torch.arange(capacity, device=state.device)
    return True


def remember(state: DecoderState) -> None:
    """Keep the recurrent states of now as a checkpoint; they are replaced, never written, by later calls."""
    if state.recurrent:
        state.checkpoints.append((state.length, list(state.recurrent)))
        del state.checkpoints[:-CHECKPOINTS]


def cut_back(layout: DecoderLayout, state: DecoderState, columns: int) -> int:
    """Drop the last `columns` columns as far as the state allows; returns the column from which tokens must be replayed.

    Raises GenerationError when the state holds fewer columns.
    """
    if columns < 0 or columns > state.length:
        raise GenerationError(f"a rollback of {columns} tokens was asked of a state that holds {state.length}.")
    target = state.length - columns
    if not state.recurrent or columns == 0:
        state.length = target
        return target
    while state.checkpoints and state.checkpoints[-1][0] > target:
        state.checkpoints.pop()
    if state.checkpoints:
        state.length, state.recurrent = state.checkpoints[-1][0], list(state.checkpoints[-1][1])
    else:
        state.length = 0
        sites = [s for s in layout.sites if s.kind == "recurrent"]
        state.recurrent = [empty_recurrence(s, state.batch, state.device) for s in sites]
    return target
