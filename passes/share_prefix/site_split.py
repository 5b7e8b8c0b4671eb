"""Cut the sites of a graph: attention reads shared and own keys as segments, a recurrence goes on from the shared states."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.emitter import Emitter
from subquad.ir.graph import shape_of, value_of
from subquad.kernels.recurrence_arguments import STATE
from subquad.passes.share_prefix.shared_operators import recurrence_arguments, softmax_arguments, token_arguments

Node = torch.fx.Node
aten = torch.ops.aten


@dataclass(frozen=True)
class Split:
    """A tensor, or a tuple of them, as its shared columns of one row and the rows' own columns.

    own: None where all columns are shared.  row, column: axes, of the tensor.  columns: how many are shared, None for all.
    """

    shared: Node
    own: Node | None
    row: int
    column: int | None
    columns: sympy.Basic | None

    def part(self, shared: bool) -> Node:
        """The shared columns, or the own ones where there are some."""
        return self.shared if shared or self.own is None else self.own


def length_of(emit: Emitter, node: Node, dim: int) -> Any:
    """The size of an axis, as a number or a node."""
    size = (shape_of(node) or ())[dim]
    return size if isinstance(size, int) else emit.call(aten.sym_size.int, node, dim)


class SiteSplit:
    """Splits attention operators; the tensors they read are in `splits`, and whole(node) joins one again."""

    emit: Emitter

    def __init__(self, splits: dict[Node, Split], whole: Callable[[Node], Node]) -> None:
        self.splits, self.whole = splits, whole
        self.count = self.keys_only = 0
        """Operators that were split: wholly, or their keys alone."""

    def attention(self, node: Node, emit: Emitter, claimed: bool) -> Split | Node | None:
        """Own queries read shared and own keys as segments; shared queries read shared keys alone.

        claimed: columns of the result are proved shared.
        """
        self.emit = emit
        named = softmax_arguments(node)
        q, (k,), (v,) = named["q"], named["k"], named["v"]
        query, key, value = (self.splits.get(n) for n in (q, k, v))
        if key is None or value is None or (key.row, value.row) != (0, 0) or key.columns != value.columns:
            return None
        read = torch.utils._pytree.tree_leaves([named[name] for name in ("bias", "sinks", "operands")])
        given = any(named[name] for name in ("rows", "lengths", "positions")) or named["q_positions"] is not None
        if given or any(isinstance(n, Node) and n in self.splits for n in read):
            return None
        if (key.own is None) != (value.own is None) or (key.own is not None and (key.column, value.column) != (1, 1)):
            return None
        if query is None or not claimed:
            self.keys_only += 1
            return self._operator(named, self.whole(q), key, value, None)
        if query.own is None and key.own is None:
            self.count += 1
            return Split(self._call(named, query.shared, [key.shared], [value.shared], [], None), None, 0, None, None)
        if query.own is None or key.own is None or query.columns != key.columns or (query.row, query.column) != (0, 1):
            return None
        shared = self._call(named, query.shared, [key.shared], [value.shared], [], None)
        start, own = length_of(self.emit, query.shared, 1), length_of(self.emit, query.own, 1)
        places = emit.call(
            aten.arange.start, start, emit.call(operator.add, start, own), dtype=torch.int64, device=_device(q)
        )
        at = emit.call(
            aten.expand.default, emit.call(aten.unsqueeze.default, places, 0), [length_of(self.emit, query.own, 0), own]
        )
        self.count += 1
        found = self._operator(named, query.own, key, value, at)
        return Split(shared, found, 0, 1, query.columns)

    def recurrence(
        self, node: Node, emit: Emitter, axes: tuple[int, int | None, sympy.Basic | None] | None
    ) -> Split | None:
        """Shared tokens run for one row; own ones go on from the states behind them.

        axes: of rows and columns in the output, and how many columns are shared; None where nothing is proved.
        """
        self.emit, named = emit, recurrence_arguments(node)
        parts = {name: self.splits.get(named[name]) for name in token_arguments(named)}
        found = [part for part in parts.values() if part is not None]
        if axes is None or len(found) < len(parts) or len({part.own is None for part in found}) > 1:
            return None

        def call(shared: bool, states: dict[str, Node]) -> Node:
            given = {name: part.part(shared) for name, part in parts.items() if part is not None}
            return self.emit.call(torch.ops.subquad.recurrence.default, *(named | given | states).values())

        own = found[0].own
        if own is not None and any((part.row, part.column, part.columns) != (0, 1, axes[2]) for part in found):
            return None
        self.count += 1
        first = call(True, {})
        if own is None:
            return Split(first, None, 0, None, None)
        states, rows = {}, length_of(self.emit, own, 0)
        for number, name in enumerate(STATE, 1):
            one = self.emit.call(operator.getitem, first, number)
            shape = shape_of(one) or ()
            states[name] = self.emit.call(aten.expand.default, one, [rows, *[-1] * (len(shape) - 1)])
        return Split(first, call(False, states), *axes)

    def _operator(self, named: dict[str, Any], q: Node, key: Split, value: Split, at: Node | None) -> Node:
        """Attention of rows' own queries over the segments of keys."""
        emit, rows = self.emit, length_of(self.emit, q, 0)
        zero = emit.call(aten.zeros.default, [rows], dtype=torch.int64, device=_device(q))
        k, v, maps = [key.shared], [value.shared], [zero]
        if key.own is not None and value.own is not None:
            k, v = [*k, key.own], [*v, value.own]
            maps.append(emit.call(aten.zeros.default, [0], dtype=torch.int64, device=_device(q)))
        return self._call(named, q, k, v, maps, at)

    def _call(
        self, named: dict[str, Any], q: Node, k: list[Node], v: list[Node], rows: list[Node], at: Node | None
    ) -> Node:
        given = named | {"q": q, "k": k, "v": v, "rows": rows, "q_positions": at}
        return self.emit.call(torch.ops.subquad.softmax_attention.default, *given.values())


def _device(node: Node) -> torch.device:
    value = value_of(node)
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")
