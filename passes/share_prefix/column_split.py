"""Cut a graph at a shared column: what rows have in common is computed for one row, the rest for all, joined by keys and values.

Every tensor of which columns are proved shared is carried as two: its shared columns, of one row, and the rows' own columns.
An operation that treats columns alone runs on each; attention of own queries reads both stores of keys; a recurrence goes on
from the states behind the shared columns; what has no rule gets the tensors joined again, so that the graph stays the same
function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.emitter import Emitter
from subquad.ir.graph import shape_of, source_of, value_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.symbolic_tensor import is_one
from subquad.passes.share_prefix.claims import Claims
from subquad.passes.share_prefix.shared_rules import is_pointwise, operation_name
from subquad.passes.share_prefix.site_split import SiteSplit, Split, length_of

Node = torch.fx.Node
aten = torch.ops.aten
ALONE = {"linear", "embedding", "softmax", "log_softmax", "sum", "mean", "amax", "dropout", "cast", "contiguous"}
"""Kinds that act on each column by itself where the claim of their result holds."""
ALONE_BY_NAME = {"layer_norm", "rms_norm", "var", "var_mean", "norm", "linalg_vector_norm", "glu"}
VIEWS = {"transpose", "t", "permute", "movedim", "unsqueeze", "unflatten", "flatten", "split", "split_with_sizes", "chunk",
         "unbind", "getitem", "select", "slice", "narrow"}  # fmt: skip
"""Kinds that move whole rows and columns; sizes, rows and columns are no arguments of theirs."""


class ColumnSplit:
    """Splits one graph in place; the nodes that compute whole tensors stay behind as dead code."""

    def __init__(self, module: torch.fx.GraphModule, claims: Claims) -> None:
        self.module, self.claims = module, claims
        self.splits: dict[Node, Split] = {}
        self.joined: dict[Node, Node] = {}
        self.sites = SiteSplit(self.splits, self._whole)
        self.joints: list[Node] = []
        """Nodes that got tensors joined again although their own result is shared."""

    def run(self) -> None:
        """Visit all nodes in order."""
        for node in list(self.module.graph.nodes):
            if node.op in ("placeholder", "get_attr"):
                continue
            self.emit = Emitter(self.module, node)
            if node.op == "output":
                self._join_inputs(node)
            elif not any(source in self.splits for source in node.all_input_nodes):
                self._source(node)
            else:
                self._visit(node)

    def _visit(self, node: Node) -> None:
        found = self._found(node)
        if isinstance(found, Split):
            self.splits[node] = found
        elif found is not None:
            node.replace_all_uses_with(found)
        elif all(self.splits[n].own is None for n in node.all_input_nodes if n in self.splits):
            self._source(node)
        else:
            if self._axes(node) is not None:
                self.joints.append(node)
            self._join_inputs(node)

    def _found(self, node: Node) -> Split | Node | None:
        """The node as a split, a node that takes its place, or None where it needs its inputs whole."""
        if node.target is torch.ops.subquad.softmax_attention.default:
            return self.sites.attention(node, self.emit, self.claims.get(node) is not None)
        if node.target is torch.ops.subquad.recurrence.default:
            return self.sites.recurrence(node, self.emit, self._axes(node))
        name = kind(node)
        if name == "sym_size":
            return self._size(node)
        if name == "cat":
            return self._cat(node)
        if name in ("view", "expand"):
            return self._sized(node)
        if name in VIEWS:
            return self._moved(node)
        if name in ALONE or operation_name(node) in ALONE_BY_NAME:
            return self._alone(node)
        return self._pointwise(node) if is_pointwise(node) else None

    def _axes(self, node: Node) -> tuple[int, int | None, sympy.Basic | None] | None:
        """Axes of rows and columns, and the shared columns, as the claim of a node has them."""
        claim = self.claims.get(node)
        if claim is None or claim.group != 0 or not claim.row.is_Symbol:
            return None
        row = _number(claim.row)
        if claim.column is None:
            return row, None, None
        return (row, _number(claim.column), claim.columns) if claim.column.is_Symbol else None

    def _source(self, node: Node) -> None:
        """A tensor whose rows are all equal, made from whole ones."""
        axes, shape = self._axes(node), shape_of(node)
        if axes is None or axes[1] is not None or shape is None or is_one(shape[axes[0]]):
            return
        with self.module.graph.inserting_after(node):
            first = self.module.graph.call_function(aten.slice.Tensor, (node, axes[0], 0, 1))
        value = value_of(node)
        first.meta["val"] = value.narrow(axes[0], 0, 1) if isinstance(value, torch.Tensor) else None
        self.splits[node] = Split(first, None, axes[0], None, None)

    def _both(self, node: Node, make: Callable[[bool], Node]) -> Split | None:
        """make(True) for the shared part and make(False) for the own one, as the claim of the node says."""
        axes = self._axes(node)
        parts = [self.splits[n] for n in node.all_input_nodes if n in self.splits]
        cuts = {part.columns for part in parts if part.own is not None}
        if axes is None:
            return None
        if not cuts:
            return Split(make(True), None, axes[0], None, None) if axes[1] is None else None
        if len(cuts) > 1 or axes[1] is None or axes[2] not in cuts:
            return None
        return Split(make(True), make(False), *axes)

    def _alone(self, node: Node) -> Split | None:
        """The same operation on the first operand's parts."""
        taken = [n for n in node.all_input_nodes if n in self.splits]
        if len(taken) != 1 or (kind(node) == "dropout" and arguments(node)["train"]):
            return None
        return self._both(node, lambda shared: self._same(node, shared))

    def _same(self, node: Node, shared: bool) -> Node:
        def part(source: Node) -> Node:
            split = self.splits.get(source)
            return source if split is None else split.part(shared)

        return self.emit.operation(node, *torch.fx.node.map_arg((node.args, dict(node.kwargs)), part))

    def _moved(self, node: Node) -> Split | Node | None:
        source = node.args[0]
        assert isinstance(source, Node)
        split = self.splits.get(source)
        if split is None:
            return None
        if shape_of(source) is None:
            return self._tuple_item(node)
        named = arguments(node)
        if kind(node) == "slice" and named["start"] in (None, 0) and named["step"] == 1 and _open(named["end"]):
            return split
        if kind(node) in ("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"):
            place = named["dim"] % len(shape_of(source) or ())
            if place == split.column:
                return self._cut(node, split, named)
            if place == split.row:
                return None
        if kind(node) == "getitem" or (kind(node) == "unflatten" and named["dim"] in (split.row, split.column)):
            return None
        if shape_of(node) is None:
            parts = [None if n is None else self._same(node, n is split.shared) for n in (split.shared, split.own)]
            assert parts[0] is not None
            return Split(parts[0], parts[1], split.row, split.column, split.columns)
        return self._both(node, lambda shared: self._same(node, shared))

    def _tuple_item(self, node: Node) -> Split | Node | None:
        """One of several results; what has no columns any more is that of the own ones."""
        axes, split = self._axes(node), self.splits[node.args[0]]  # type: ignore[index]
        if axes is None:
            carried = split.own is not None and split.own.target is torch.ops.subquad.recurrence.default
            return self.emit.operation(node, (split.own, node.args[1]), {}) if carried else None
        parts = [
            None if n is None else self.emit.operation(node, (n, node.args[1]), {}) for n in (split.shared, split.own)
        ]
        assert parts[0] is not None
        return Split(parts[0], parts[1], *axes)

    def _cut(self, node: Node, split: Split, named: dict[str, Any]) -> Node | None:
        """Columns behind the shared ones: the own part alone."""
        start = named.get("start")
        if kind(node) != "slice" or split.own is None or split.columns is None or named.get("step", 1) != 1:
            return None
        if not (
            isinstance(start, int)
            and _open(named.get("end"))
            and split.columns.is_Integer
            and start >= int(split.columns)
        ):
            return None
        begin = start - int(split.columns)
        return split.own if begin == 0 else self.emit.call(aten.slice.Tensor, split.own, split.column, begin, 2**63 - 1)

    def _size(self, node: Node) -> Node | None:
        named = arguments(node)
        split, dim = self.splits[named["x"]], named["dim"]
        if split.own is None or dim is None:
            return None
        dim %= len(shape_of(named["x"]) or ())
        length = self.emit.call(aten.sym_size.int, split.own, dim)
        if dim != split.column:
            return length
        return self.emit.call(operator.add, length, length_of(self.emit, split.shared, dim))

    def _sized(self, node: Node) -> Split | None:
        """A view or expansion, whose sizes are written out."""
        named, axes = arguments(node), self._axes(node)
        source, sizes = named["x"], named.get("size")
        split = self.splits.get(source)
        if split is None or axes is None or not isinstance(sizes, list | tuple):
            return None
        target = aten.reshape.default if kind(node) == "view" else aten.expand.default

        def make(shared: bool) -> Node:
            part, wide = split.part(shared), list(sizes)
            if shared or split.own is None:
                wide[axes[0]] = 1
            if axes[1] is not None:
                assert split.column is not None
                wide[axes[1]] = length_of(self.emit, part, split.column)
            return self.emit.call(target, part, wide)

        return self._both(node, make)

    def _cat(self, node: Node) -> Split | None:
        """Shared parts in front, then own ones; or parts side by side along another axis."""
        named, axes = arguments(node), self._axes(node)
        parts = list(named["tensors"])
        if axes is None:
            return None
        row, column, columns = axes
        place = named["dim"] % len(shape_of(node) or ())
        if place == row:
            return None
        if place != column:
            return (
                self._both(node, lambda shared: self._same(node, shared))
                if all(n in self.splits for n in parts)
                else None
            )
        front: list[Node] = []
        while parts and parts[0] in self.splits and self.splits[parts[0]].own is None:
            front.append(self.splits[parts.pop(0)].shared)
        behind: list[Node] = []
        if parts and parts[0] in self.splits:
            first = self.splits[parts.pop(0)]
            assert first.own is not None
            front.append(first.shared)
            behind.append(first.own)
        behind += [self._whole(part) for part in parts]
        if not front or not behind:
            return None
        one, other = (n[0] if len(n) == 1 else self.emit.call(aten.cat.default, n, place) for n in (front, behind))
        return Split(one, other, row, column, columns)

    def _pointwise(self, node: Node) -> Split | None:
        axes = self._axes(node)
        if axes is None:
            return None
        rank, column = len(shape_of(node) or ()), axes[1]

        def make(shared: bool) -> Node:
            cut = next(
                (s for n in node.all_input_nodes if (s := self.splits.get(n)) is not None and s.own is not None), None
            )

            def part(source: Node) -> Node:
                split, shape = self.splits.get(source), shape_of(source)
                if split is not None and (split.own is not None or cut is None):
                    return split.part(shared)
                held = source if split is None else split.shared
                if split is None and shared and shape is not None and (at := axes[0] - (rank - len(shape))) >= 0:
                    held = held if is_one(shape[at]) else self.emit.call(aten.slice.Tensor, held, at, 0, 1)
                if shape is None or cut is None or column is None:
                    return held
                assert cut.column is not None
                place = column - (rank - len(shape))
                if place < 0 or is_one(shape[place]):
                    return held
                length = length_of(self.emit, cut.shared, cut.column)
                ends = (0, length) if shared else (length, 2**63 - 1)
                return self.emit.call(aten.slice.Tensor, held, place, *ends)

            return self.emit.operation(node, *torch.fx.node.map_arg((node.args, dict(node.kwargs)), part))

        return self._both(node, make)

    def _join_inputs(self, node: Node) -> None:
        node.args, node.kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), self._whole)

    def _whole(self, node: Node) -> Node:
        """The tensor for all rows and columns."""
        split = self.splits.get(node)
        if split is None or split.own is None or shape_of(node) is None:
            return node
        if node not in self.joined:
            sizes: list[Any] = [-1] * len(shape_of(node) or ())
            sizes[split.row] = length_of(self.emit, split.own, split.row)
            wide = self.emit.call(aten.expand.default, split.shared, sizes)
            self.joined[node] = self.emit.call(aten.cat.default, [wide, split.own], split.column)
        return self.joined[node]

    def first_joint(self) -> str:
        """Where tensors were joined again although their own result is shared, as a sentence's end; "" for nowhere."""
        if not self.joints:
            return ""
        node = self.joints[0]
        return f"; {operation_name(node)} at {source_of(node) or node.name} reads shared and own columns together"


def _open(end: object) -> bool:
    """True for the end of a slice that goes to the end."""
    return end is None or (isinstance(end, int) and end >= 2**62)


def _number(symbol: sympy.Basic) -> int:
    return int(str(symbol)[1:])
