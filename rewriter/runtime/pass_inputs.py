"""The inputs that all programs of one pass share: which tokens run, where they stand in their rows, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels.tree import ancestors
from subquad.runtime.layout import DecoderLayout
from subquad.runtime.state import DecoderState


@dataclass(frozen=True)
class Tokens:
    """The tokens of a pass over B rows.

    ids: int64 [B, w].  columns: int64 [B, w], the place of each in its row.  places: int64 [B, w], the slots of their keys.
    tree: bool [B, w, w], which of them each one comes after, itself included; None where columns say it.  real: bool [B, w],
    None where all are.  total: columns of the longest row behind them.  slots: slots of a row's own keys that are read.
    """

    ids: Tensor
    columns: Tensor
    places: Tensor
    tree: Tensor | None
    real: Tensor | None
    total: int
    slots: int


class Beside(NamedTuple):
    """What makes probes of some tokens of a pass.

    added: [B, w, e], added to the embeddings where they enter the first block, zero for others.  tree: bool [B, w, w] and
    depths: int64 [B, w], which of the tokens each one sees, and how far behind what is committed it stands; None for chains.
    """

    added: Tensor
    tree: Tensor | None
    depths: Tensor | None


def next_tokens(state: DecoderState, ids: Tensor, parents: Tensor | None, beside: Beside | None = None) -> Tokens:
    """The tokens ids [B, w] behind what the state holds, as chains or as the trees of `parents` int64 [w] or [B, w].

    beside: says instead of the parents who sees whom, where it does.
    Tokens that a recurrent state has not seen yet run before them again.
    """
    width = ids.shape[1]
    total, slots = state.length + width, state.own + width
    lengths, base = (torch.tensor(side, device=state.device)[:, None] for side in (state.lengths, state.base))
    nodes = state.arange[:width]
    if beside is not None and beside.tree is not None and beside.depths is not None:
        return Tokens(ids, lengths + beside.depths, lengths - base + nodes, beside.tree, None, total, slots)
    if parents is not None:
        tree = ancestors(parents).expand(state.batch, width, width)
        return Tokens(ids, lengths + tree.sum(-1) - 1, lengths - base + nodes, tree, None, total, slots)
    behind = lag(state)
    if not behind:
        columns = lengths + nodes
        return Tokens(ids, columns, columns - base, None, None, total, slots)
    seen = torch.tensor(state.recurrence.columns, device=state.device)[:, None]
    columns = lengths - behind + state.arange[: behind + width]
    real = columns >= seen
    places = torch.where(real, columns - base, slots + state.arange[: behind + width])
    columns = torch.where(real, columns, (lengths - 1).clamp_min(0))
    held = next(iter(state.tokens.values())).gather(1, columns[:, :behind])
    return Tokens(torch.cat([held, ids], 1), columns, places, None, real, total, slots)


def lag(state: DecoderState) -> int:
    """Tokens that the recurrent states have yet to see, in the row with most of them."""
    if not state.recurrence.sites:
        return 0
    return max(length - done for length, done in zip(state.lengths, state.recurrence.columns, strict=True))


class StepInputs:
    """The shared inputs of a step by name; what no program reads is not computed.

    tokens: padding and the like are read from the state's buffers, the ids from the pass.
    """

    def __init__(self, layout: DecoderLayout, state: DecoderState, tokens: Tokens) -> None:
        self.layout, self.state, self.tokens = layout, state, tokens
        self.history: Sequence[Tensor] = ()

    def __getitem__(self, name: str) -> Tensor:
        if name in self.layout.inputs:
            return self._strung(self._input(name))[None]
        if name in _VALUES:
            return _VALUES[name](self)
        kind, _, number = name.rpartition("_")
        if kind == "fixed":
            return self.state.fixed[int(number)]
        if not self.history:
            assert self.layout.history is not None
            self.history = self.layout.history(
                *(self.state.tokens[one][:, : self.tokens.total] for one in self.layout.inputs)
            )
        if kind == "table":
            return self.history[int(number)].contiguous()
        value = self.history[self.layout.tables + int(number)]
        if self.layout.past_axes[int(number)] == 0:
            return value.index_select(0, self._strung(self.tokens.columns))
        batch = self.state.batch
        rows = torch.arange(batch, device=value.device)[:, None] * (value.shape[0] > 1)
        return self._strung(value[rows, self.tokens.columns])[None]

    def _input(self, name: str) -> Tensor:
        if name == self.layout.inputs[0]:
            return self.tokens.ids
        return self.state.tokens[name].gather(1, self.tokens.columns)

    def _strung(self, value: Tensor) -> Tensor:
        return value.flatten(0, 1)

    def _rows(self) -> Tensor:
        return self.state.arange.new_tensor(range(self.state.batch)).repeat_interleave(self.tokens.ids.shape[1])

    def _keys(self) -> Tensor:
        tokens = self.tokens
        keys = self.state.arange[: tokens.slots].expand(self.state.batch, -1)
        if self.state.shared is not None:
            keys = keys + keys.new_tensor(self.state.base)[:, None]
        return keys.contiguous() if tokens.tree is None else keys.scatter(1, tokens.places, tokens.columns)

    def _nodes(self) -> Tensor:
        shared = self.state.shared
        return torch.empty(0, 5, dtype=torch.int64) if shared is None else shared.nodes

    def _slots(self) -> Tensor:
        shared = self.state.shared
        return self.state.arange[:0] if shared is None else shared.places

    def _tree(self) -> Tensor:
        tokens, (batch, width) = self.tokens, self.tokens.ids.shape
        slots = self.state.arange[: tokens.slots]
        if tokens.tree is None:
            return torch.ones(batch, width, tokens.slots, dtype=torch.bool, device=slots.device)
        before = (slots < tokens.places[:, :1])[:, None, :].repeat(1, width, 1)
        return before.scatter(2, tokens.places[:, None, :].expand(-1, width, -1), tokens.tree)

    def _real(self) -> Tensor:
        real = self.tokens.real
        return torch.ones_like(self.tokens.ids, dtype=torch.bool) if real is None else real


_VALUES: dict[str, Callable[[StepInputs], Tensor]] = {
    "columns": lambda one: one._strung(one.tokens.columns),
    "places": lambda one: one._strung(one.tokens.places),
    "rows": StepInputs._rows,
    "queries": lambda one: one.tokens.columns,
    "keys": StepInputs._keys,
    "tree": StepInputs._tree,
    "real": StepInputs._real,
    "nodes": StepInputs._nodes,
    "slots": StepInputs._slots,
}


def prompt_inputs(layout: DecoderLayout, state: DecoderState, ids: Tensor) -> dict[str, Tensor]:
    """The shared inputs of a prompt [B, T] that the state's token buffers hold already."""
    width = ids.shape[1]
    shared = {name: state.tokens[name][:, :width] for name in layout.inputs}
    shared["columns"] = state.arange[:width]
    shared |= {f"fixed_{n}": value for n, value in enumerate(state.fixed)}
    if layout.history is not None:
        values = layout.history(*(shared[name] for name in layout.inputs))
        for n, value in enumerate(values):
            past = n - layout.tables
            shared[f"table_{n}" if past < 0 else f"past_{past}"] = value.contiguous()
    return shared
