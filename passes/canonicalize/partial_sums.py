"""An addition to a part of a tensor becomes the addition of a tensor that is zero elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import dtype_of, rank_of, shape_of, value_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.canonicalize.emitting import emit, emit_as

Node = torch.fx.Node
aten = torch.ops.aten
Ranges = dict[int, tuple[int, int | None]]
"""By axis, the first place of a range and the place behind its last one, None for the end of the axis."""


def parts_added_whole(module: torch.fx.GraphModule) -> None:
    """Replace, in place, every write of x[range] + b into x[range] by x + (b, and zero outside the range).

    A write of what the range holds already, as the statement `x[range] += b` leaves behind, goes, and so does a write of
    the whole.  module: a functional graph with recorded values.  A range whose ends are computed stays as it is.
    """
    writes = _Writes()
    for node in list(module.graph.nodes):
        if kind(node) == "slice_scatter":
            stands = writes.amount_to(node)
            if stands is not None:
                node.replace_all_uses_with(stands)
                module.graph.erase_node(node)


class _Writes:
    """The writes of one graph; `held` says of what was written which range of which sum it is."""

    def __init__(self) -> None:
        self.held: dict[Node, tuple[Node, Ranges]] = {}

    def amount_to(self, node: Node) -> Node | None:
        """What a write amounts to; None where it stays."""
        a = arguments(node)
        x, written = a["x"], _same_content(a["src"])
        dim, shape = int(a["dim"]) % (rank_of(node) or 1), shape_of(node) or ()
        ends = _range(a["start"], a["end"], shape[dim]) if a["step"] == 1 else None
        if ends is None or dtype_of(written) != dtype_of(node):
            return None
        if ends == (0, None):
            return uncut(written)
        root, ranges = self._cut(x)
        if dim in ranges:
            return None
        place = root, ranges | {dim: ends}
        if self._cut(written) == place:
            return uncut(x)
        if kind(written) not in ("add", "sub"):
            return None
        b = arguments(written)
        sides = [b["a"], b["b"]] if kind(written) == "add" and b["alpha"] == 1 else [b["a"]]
        part = next((side for side in sides if isinstance(side, Node) and self._cut(side) == place), None)
        other = b["b"] if part is b["a"] else b["a"]
        if part is None or not isinstance(other, Node) or dtype_of(other) != dtype_of(node):
            return None
        made = _sum(node, written, uncut(x), other, dim, ends, b["alpha"])
        if made is not None:
            self.held[written] = made, {dim: ends}
        return made

    def _cut(self, node: Any) -> tuple[Any, Ranges]:
        """The tensor that a node is a range of along some axes, and these ranges; itself and none for any other node."""
        ranges: Ranges = {}
        while True:
            node = _same_content(node)
            here = self.held[node][1] if node in self.held else ranges_of(node)
            if here is None or here.keys() & ranges.keys():
                return node, ranges
            ranges |= here
            node = self.held[node][0] if node in self.held else arguments(node)["x"]


def _sum(node: Node, written: Node, x: Node, other: Node, dim: int, ends: Any, alpha: Any) -> Node | None:
    """x plus, or minus, what is added to its range, which is zero elsewhere."""
    first, stop = ends
    size, wide = (shape_of(node) or ())[dim], (shape_of(written) or ())[dim]
    spread = _spread(node, other, dim, wide)
    if spread is None or (stop is not None and not isinstance(size, int)):
        return None
    after = 0 if stop is None else size - stop
    pads = [0, 0] * ((rank_of(node) or 1) - 1 - dim) + [first, after]
    padded = emit_as(
        node,
        _padded(value_of(spread), dim - (rank_of(node) or 0), size),
        aten.constant_pad_nd.default,
        spread,
        pads,
        0.0,
    )
    operator = aten.add.Tensor if kind(written) == "add" else aten.sub.Tensor
    return emit(node, operator, x, padded, **({} if alpha == 1 else {"alpha": alpha}))


def _padded(value: torch.Tensor, dim: int, size: Any) -> torch.Tensor:
    """The fake value of a tensor padded along an axis to a size."""
    with value.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        return value.new_empty([size if n == dim + value.dim() else held for n, held in enumerate(value.shape)])


def _spread(node: Node, other: Node, dim: int, wide: Any) -> Node | None:
    """What is added, as wide as its range along the written axis; None where that is a broadcast to an unknown size."""
    held = shape_of(other) or ()
    at = dim - (rank_of(node) or 0) + len(held)
    if at >= 0 and str(held[at]) == str(wide):
        return other
    if not isinstance(wide, int):
        return None
    sizes = [wide, *[1] * (-at - 1), *[-1] * len(held)] if at < 0 else [-1] * len(held)
    sizes[max(at, 0)] = wide
    return emit(node, aten.expand.default, other, sizes)


def uncut(node: Node) -> Node:
    """The same content without slices that cut nothing off."""
    while ranges_of(node) == {}:
        node = arguments(node)["x"]
    return node


def ranges_of(node: Any) -> Ranges | None:
    """The ranges that one slice, or one index of slices alone, cuts out; None for any other operation."""
    name = kind(node)
    if name not in ("slice", "getitem"):
        return None
    a = arguments(node)
    shape = shape_of(a["x"])
    if shape is None:
        return None
    if name == "slice":
        items = {int(a["dim"]) % len(shape): (a["start"], a["end"], a["step"])}
    else:
        index = list(a["index"]) if isinstance(a["index"], tuple | list) else [a["index"]]
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index[at : at + 1] = [slice(None)] * (len(shape) - len(index) + 1)
        if not all(isinstance(item, slice) for item in index):
            return None
        items = {n: (item.start, item.stop, item.step) for n, item in enumerate(index)}
    found: Ranges = {}
    for dim, (start, stop, step) in items.items():
        ends = _range(start, stop, shape[dim]) if step in (1, None) else None
        if ends is None:
            return None
        if ends != (0, None):
            found[dim] = ends
    return found


def _range(start: Any, stop: Any, size: Any) -> tuple[int, int | None] | None:
    """The ends of a range of fixed numbers; None for one that is computed, or counted from the end of an unknown size."""
    first, last = 0 if start is None else start, stop
    if not isinstance(first, int) or not isinstance(last, int | None):
        return None
    if isinstance(size, int):
        first, last, _ = slice(first, last).indices(size)
        return first, None if last == size else last
    if first < 0 or (last is not None and last < 2**62):
        return None
    return first, None


def _same_content(node: Any) -> Any:
    """The node behind copies that change neither shape nor dtype."""
    while kind(node) in ("copy", "contiguous"):
        a = arguments(node)
        source = a["src"] if kind(node) == "copy" else a["x"]
        if not isinstance(source, Node) or dtype_of(source) != dtype_of(node):
            return node
        if str(shape_of(source)) != str(shape_of(node)):
            return node
        node = source
    return node
