"""A tree of token runs whose keys and values are stored once: filled node by node, read by the rows below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.runtime.layout import DecoderLayout
from subquad.runtime.state import DecoderState, Recurrence, SharedKeys, descendant, key_buffers, new_state, runs_of


@dataclass(frozen=True)
class TreeNode:
    """A run of tokens.  slot: its first in the tree's buffers.  start: its first column.  path: the nodes from the root to
    it, itself last.
    """

    slot: int
    start: int
    tokens: Tensor
    path: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.tokens.shape[0])

    @property
    def stop(self) -> int:
        """The column behind its last."""
        return self.start + self.length


class KeyTree:
    """Nodes in the order in which they were added; a node's keys are there once `fill` wrote them."""

    def __init__(self, layout: DecoderLayout, slots: int, device: torch.device) -> None:
        """slots: tokens of all nodes together."""
        self.layout, self.device = layout, device
        self.pools, self.k, self.v = key_buffers(layout, (slots,), device)
        self.places = torch.zeros(slots, dtype=torch.int64, device=device)
        self.nodes: list[TreeNode] = []
        self._recurrent: list[tuple[tuple[Tensor, ...], ...]] = []
        self._used = 0

    def add(self, tokens: Tensor, parent: int | None) -> int:
        """The number of a new node of these tokens int64 [l] behind another, or None for one that begins a row."""
        path = () if parent is None else self.nodes[parent].path
        start = self.nodes[parent].stop if parent is not None else 0
        first, behind = self._used, self._used + int(tokens.shape[0])
        self.nodes.append(TreeNode(first, start, tokens, (*path, len(self.nodes))))
        self.places[first:behind] = torch.arange(start, start + behind - first)
        self._recurrent.append(())
        self._used = behind
        return len(self.nodes) - 1

    def rows(self, above: Sequence[int | None], room: int) -> DecoderState:
        """A state whose row r goes on behind node above[r], or starts anew, with room for `room` tokens of its own."""
        columns = [0 if node is None else self.nodes[node].stop for node in above]
        state = new_state(self.layout, len(above), max(columns) + room, self.device, own=room)
        ids = next(iter(state.tokens.values()))
        paths = [() if node is None else self.nodes[node].path for node in above]
        for row, path in enumerate(paths):
            for number in path:
                node = self.nodes[number]
                ids[row, node.start : node.stop] = node.tokens
        table = [
            (node.slot, node.length, node.start, first, behind - first)
            for number, node in enumerate(self.nodes)
            for first, behind in runs_of([number in path for path in paths])
            if node.length
        ]
        state.lengths = list(columns)
        state.recurrence = self._after(above, state.recurrence)._replace(columns=tuple(columns))
        nodes = torch.tensor(table, dtype=torch.int64).view(-1, 5)
        state.shared = SharedKeys(self.k, self.v, self.places, nodes, tuple(columns), state.recurrence)
        return state

    def fill(self, number: int, state: DecoderState, row: int) -> None:
        """Keep what a state made by `rows` holds of its row's own columns as the keys of a node."""
        node = self.nodes[number]
        for pool, own in zip(self.pools, state.pools, strict=True):
            pool[:, node.slot : node.slot + node.length] = own[:, row, : node.length]
        self._recurrent[number] = tuple(tuple(t[row : row + 1] for t in site) for site in state.recurrence.sites)

    def load(self, number: int, keys: Sequence[Tensor]) -> None:
        """Take a node's keys from elsewhere: those of every KV site, then its values, [length, Hkv, K|V]."""
        node = self.nodes[number]
        for buffer, source in zip((*self.k, *self.v), keys, strict=True):
            buffer[node.slot : node.slot + node.length] = source

    def _after(self, above: Sequence[int | None], empty: Recurrence) -> Recurrence:
        """The recurrent states behind the nodes."""
        sites = tuple(
            tuple(
                torch.cat([t[:1] if node is None else self._recurrent[node][n][m] for node in above])
                for m, t in enumerate(site)
            )
            for n, site in enumerate(empty.sites)
        )
        return empty._replace(sites=sites)


def separate(layout: DecoderLayout, state: DecoderState, room: int) -> DecoderState:
    """The same rows with all keys and values of their own, and with room for `room` more columns."""
    if state.shared is None:
        return state
    alone = new_state(layout, state.batch, state.length + room, state.device)
    plain = descendant(state, range(state.batch), alone.pools, alone.k, alone.v)
    for name, tokens in plain.tokens.items():
        alone.tokens[name][:, : tokens.shape[1]] = tokens[:, : alone.capacity]
    plain.tokens, plain.arange = alone.tokens, alone.arange
    for olds, owns, news in ((state.shared.k, state.k, plain.k), (state.shared.v, state.v, plain.v)):
        for old, own, new in zip(olds, owns, news, strict=True):
            for slot, length, column, first, rows in state.shared.nodes.tolist():
                new[first : first + rows, column : column + length] = old[slot : slot + length]
            for row, (base, length) in enumerate(zip(state.base, state.lengths, strict=True)):
                new[row, base:length] = own[row, : length - base]
    return plain


def columns_of(state: DecoderState, row: int, start: int, stop: int) -> tuple[Tensor, ...]:
    """Keys, then values, of every KV site of columns start .. stop - 1 of a row: [stop - start, Hkv, K|V], copied."""
    base = state.base[row]
    nodes = [] if state.shared is None else state.shared.nodes.tolist()
    mine = [(slot, length, column) for slot, length, column, first, rows in nodes if first <= row < first + rows]
    olds = (*state.k, *state.v) if state.shared is None else (*state.shared.k, *state.shared.v)
    found = []
    for own, old in zip((*state.k, *state.v), olds, strict=True):
        out = own.new_empty(stop - start, *own.shape[2:])
        for slot, length, column in mine:
            first, last = max(start, column), min(stop, column + length)
            if first < last:
                out[first - start : last - start] = old[slot + first - column : slot + last - column]
        if stop > base:
            first = max(start, base)
            out[first - start :] = own[row, first - base : stop - base]
        found.append(out)
    return tuple(found)
