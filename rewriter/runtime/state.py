"""The state that decoding calls carry: tokens, key/value buffers, recurrent states, and the length of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.layout import DecoderLayout, SiteState

GRAIN = 256
"""Buffers grow to a multiple of this many slots, at least by half."""
OWN_GRAIN = 16
"""The same where rows share most of their columns, and there are many of them."""
CHECKPOINTS = 4
"""Recurrent states of this many calls are kept; a rollback further than that replays the tokens."""


class Recurrence(NamedTuple):
    """Recurrent states and the columns of each row that went into them.

    sites: per recurrent site (state, window_k, window_v, seen); they are replaced, never written.
    """

    columns: tuple[int, ...]
    sites: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values that rows have in common: a tree of nodes, each stored once.

    k, v: per KV site [slots, Hkv, K|V], the slots of all nodes.  places: int64 [slots], the column that each holds.  nodes: int64
    [n, 5] on the CPU, see kernels.prefix_attention; rows are those of the state.  columns: of each row, how many lie in nodes;
    they are its first.  recurrence: the recurrent states of the rows behind them.
    """

    k: list[Tensor]
    v: list[Tensor]
    places: Tensor
    nodes: Tensor
    columns: tuple[int, ...]
    recurrence: Recurrence

    def bytes(self) -> int:
        """Bytes of the slots that nodes of the tree use, each once."""
        spans = {(int(slot), int(length)) for slot, length in self.nodes[:, :2]}
        slot = sum(t[0].numel() * t.element_size() for t in (*self.k, *self.v))
        return slot * sum(length for _, length in spans)


class Pending(NamedTuple):
    """What the last pass ran and nobody has committed yet.

    ids: int64 [B, w].  parents: per row the parent of every node, None for chains.  before: the recurrent states then.
    """

    ids: Tensor
    parents: list[list[int]] | None
    before: Recurrence


@dataclass
class DecoderState:
    """State of one sequence batch; belongs to one caller and is not shared between threads.

    lengths: columns of each row so far, left padding included.  tokens: per token input an int64 buffer [B, capacity] by
    column.  pools: keys and values of the KV sites, [sites, B, slots, Hkv, K|V] for sites of one form; slot s of a row holds its
    column base + s, and the nodes of a pending tree follow behind the row's length.  k, v: per KV site its part of the
    pools.  shared: the keys and values of the columns before the base, which rows have in common; None where base is 0.
    recurrence: it may lag behind the lengths; the next pass then runs the tokens between again.  checkpoints: the recurrence
    before earlier passes, newest last.  fixed: the values [B or 1, ...] of `Fixed`, if the model reads any.
    """

    device: torch.device
    lengths: list[int]
    tokens: dict[str, Tensor]
    pools: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    recurrence: Recurrence
    arange: Tensor
    shared: SharedKeys | None = None
    pending: Pending | None = None
    checkpoints: list[Recurrence] = field(default_factory=list)
    fixed: tuple[Tensor, ...] = ()

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Columns of the longest row."""
        return max(self.lengths)

    @property
    def capacity(self) -> int:
        """Columns that fit before the buffers grow."""
        return int(self.arange.shape[0])

    @property
    def base(self) -> tuple[int, ...]:
        """Columns of each row that are shared; its own follow."""
        return (0,) * self.batch if self.shared is None else self.shared.columns

    @property
    def own(self) -> int:
        """Most columns of its own that a row has."""
        return max(length - base for length, base in zip(self.lengths, self.base, strict=True))

    def bytes(self) -> int:
        """Bytes of keys, values and recurrent states that are live now; what rows share counts once."""
        slot = sum(t[0, 0].numel() * t.element_size() for t in (*self.k, *self.v))
        shared = 0 if self.shared is None else self.shared.bytes()
        return (
            slot * (sum(self.lengths) - sum(self.base))
            + shared
            + sum(t.numel() * t.element_size() for site in self.recurrence.sites for t in site)
        )


def new_state(
    layout: DecoderLayout, batch: int, capacity: int, device: torch.device, own: int | None = None,
    fixed: tuple[Tensor, ...] = (),
) -> DecoderState:  # fmt: skip
    """An empty state for `batch` rows with room for `capacity` columns, and for the keys of `own` of them (None: all).

    fixed: the values of the layout's `Fixed`.
    """
    capacity = _grains(capacity)
    slots = capacity if own is None else _grains(own, OWN_GRAIN)
    tokens = {
        name: torch.full((batch, capacity), int(n > 0), dtype=torch.int64, device=device)
        for n, name in enumerate(layout.inputs)
    }
    pools, k, v = key_buffers(layout, (batch, slots), device)
    arange = torch.arange(capacity, device=device)
    recurrence = empty_recurrence(layout, batch, device)
    return DecoderState(device, [0] * batch, tokens, pools, k, v, recurrence, arange, fixed=fixed)


def key_buffers(
    layout: DecoderLayout, shape: tuple[int, ...], device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(pools [sites, *shape, Hkv, K|V] of the sites of one form each; per KV site its keys and its values in them)."""
    kv = [site for site in layout.sites if site.kind == "kv"]
    forms = [*((s.kv_heads, s.key_dim, s.dtype) for s in kv), *((s.kv_heads, s.value_dim, s.dtype) for s in kv)]
    pools = {
        form: torch.zeros(forms.count(form), *shape, *form[:2], dtype=form[2], device=device)
        for form in dict.fromkeys(forms)
    }
    parts = {form: iter(pool) for form, pool in pools.items()}
    buffers = [next(parts[form]) for form in forms]
    return list(pools.values()), buffers[: len(kv)], buffers[len(kv) :]


def _grains(columns: int, grain: int = GRAIN) -> int:
    return max(grain, -(-columns // grain) * grain)


def empty_recurrence(layout: DecoderLayout, batch: int, device: torch.device) -> Recurrence:
    """The recurrent states before any token."""
    sites = tuple(_empty(site, batch, device) for site in layout.sites if site.kind == "recurrent")
    return Recurrence((0,) * batch, sites)


def _empty(site: SiteState, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    wide = torch.float64 if site.dtype == torch.float64 else torch.float32
    return (
        torch.zeros(batch, site.heads, site.features, site.value_dim + site.sums, dtype=wide, device=device),
        torch.zeros(batch, site.window, site.kv_heads, site.key_dim, dtype=site.dtype, device=device),
        torch.zeros(batch, site.window, site.kv_heads, site.value_dim, dtype=site.dtype, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def reserve(state: DecoderState, columns: int) -> None:
    """Grow the buffers so that `columns` more columns of every row fit."""
    total, own = state.length + columns, state.own + columns
    if total > state.capacity:
        capacity = _grains(max(total, state.capacity * 3 // 2))
        grow, names = capacity - state.capacity, list(state.tokens)
        state.tokens = {
            name: torch.nn.functional.pad(t, (0, grow), value=int(name != names[0])) for name, t in state.tokens.items()
        }
        state.arange = torch.arange(capacity, device=state.device)
    slots = state.pools[0].shape[2] if state.pools else own
    if own > slots:
        grow = _grains(max(own, slots * 3 // 2), GRAIN if state.shared is None else OWN_GRAIN) - slots
        _replace(state, [torch.nn.functional.pad(pool, (0, 0, 0, 0, 0, grow)) for pool in state.pools])


def _replace(state: DecoderState, pools: list[Tensor]) -> None:
    """Put other pools in the place of the state's, site by site."""
    place = {
        t.data_ptr(): part
        for old, new in zip(state.pools, pools, strict=True)
        for t, part in zip(old, new, strict=True)
    }
    state.k, state.v = ([place[t.data_ptr()] for t in side] for side in (state.k, state.v))
    state.pools = pools


def remember(state: DecoderState) -> None:
    """Keep the recurrent states of now as a checkpoint."""
    if state.recurrence.sites:
        state.checkpoints.append(state.recurrence)
        del state.checkpoints[:-CHECKPOINTS]


def commit(state: DecoderState, paths: Sequence[Sequence[int]]) -> None:
    """Keep, of the pending nodes, those of each row's path (root first), and forget the others.

    Raises GenerationError for nodes that are no path of what is pending.
    """
    pending = state.pending
    if pending is None:
        raise GenerationError("nothing is pending: verify a draft before its path is committed.")
    width = pending.ids.shape[1]
    if len(paths) != state.batch:
        raise GenerationError(f"{len(paths)} paths were given for {state.batch} rows.")
    for row, path in enumerate(paths):
        parents = range(-1, width - 1) if pending.parents is None else pending.parents[row]
        known = -1
        for node in path:
            if not 0 <= node < width or parents[node] != known:
                raise GenerationError(f"{list(path)} is no path from the root of the draft of row {row}.")
            known = node
    own = [length - base for length, base in zip(state.lengths, state.base, strict=True)]
    moves = [
        (row, own[row] + node, own[row] + n)
        for row, path in enumerate(paths)
        for n, node in enumerate(path)
        if node != n
    ]
    if moves:
        rows, source, target = torch.tensor(moves, device=state.device).unbind(1)
        for pool in state.pools:
            pool[:, rows, target] = pool[:, rows, source]
    ids = next(iter(state.tokens.values()))
    for row, path in enumerate(paths):
        start = state.lengths[row]
        if any(node != n for n, node in enumerate(path)):  # the first nodes were written where they stay
            ids[row, start : start + len(path)] = pending.ids[row, list(path)]
        state.lengths[row] += len(path)
    if state.recurrence.columns != tuple(state.lengths):
        state.recurrence = pending.before
    state.pending = None


def cut_back(layout: DecoderLayout, state: DecoderState, columns: Sequence[int]) -> None:
    """Drop the last columns[b] columns of each row b, and what is pending.

    Raises GenerationError when a row holds fewer columns of its own.
    """
    for taken, length, base in zip(columns, state.lengths, state.base, strict=True):
        if not 0 <= taken <= length - base:
            held = f"{length}, {base} of them shared with other rows" if base else f"{length}"
            raise GenerationError(f"a rollback of {taken} tokens was asked of a state that holds {held}.")
    if state.pending is not None:
        state.recurrence, state.pending = state.pending.before, None
    state.lengths = [length - taken for taken, length in zip(columns, state.lengths, strict=True)]
    while any(done > length for done, length in zip(state.recurrence.columns, state.lengths, strict=True)):
        first = empty_recurrence(layout, state.batch, state.device) if state.shared is None else state.shared.recurrence
        state.recurrence = state.checkpoints.pop() if state.checkpoints else first


def select(state: DecoderState, rows: Sequence[int]) -> DecoderState:
    """A state of its own that holds these rows, in this order; a row may be taken more than once.

    What was shared stays shared; the rows' own keys and values are copied.
    """
    chosen = descendant(state, rows, list(state.pools), list(state.k), list(state.v))
    chosen.shared = None if state.shared is None else chosen_rows(state.shared, rows)
    _replace(chosen, [pool.index_select(1, _index(state, rows)) for pool in state.pools])
    return chosen


def descendant(
    state: DecoderState, rows: Sequence[int], pools: list[Tensor], k: list[Tensor], v: list[Tensor]
) -> DecoderState:
    """A state of these rows with other buffers of keys and values."""
    index = _index(state, rows)
    return DecoderState(
        state.device,
        [state.lengths[row] for row in rows],
        {name: t.index_select(0, index) for name, t in state.tokens.items()},
        pools, k, v,
        _selected(state.recurrence, rows, index),
        state.arange,
        checkpoints=[_selected(one, rows, index) for one in state.checkpoints],
        fixed=tuple(t if t.shape[0] == 1 else t.index_select(0, index.to(t.device)) for t in state.fixed),
    )  # fmt: skip


def chosen_rows(shared: SharedKeys, rows: Sequence[int]) -> SharedKeys:
    """The same slots for other rows: a node is listed once for each run of rows that read it."""
    found = []
    for slot, length, column, first, count in shared.nodes.tolist():
        reads = [first <= row < first + count for row in rows]
        found += [(slot, length, column, start, stop - start) for start, stop in runs_of(reads)]
    nodes = torch.tensor(sorted(found, key=lambda node: node[2]), dtype=torch.int64).view(-1, 5)
    index = torch.tensor(list(rows), dtype=torch.int64)
    columns = tuple(shared.columns[row] for row in rows)
    return SharedKeys(shared.k, shared.v, shared.places, nodes, columns, _selected(shared.recurrence, rows, index))


def runs_of(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, behind the last) of each run of True."""
    found: list[tuple[int, int]] = []
    for place, flag in enumerate(flags):
        if flag and found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        elif flag:
            found.append((place, place + 1))
    return found


def _index(state: DecoderState, rows: Sequence[int]) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.int64, device=state.device)


def _selected(recurrence: Recurrence, rows: Sequence[int], index: Tensor) -> Recurrence:
    sites = tuple(tuple(t.index_select(0, index.to(t.device)) for t in site) for site in recurrence.sites)
    return Recurrence(tuple(recurrence.columns[row] for row in rows), sites)
