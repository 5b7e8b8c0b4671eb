"""Find q, k and v behind their views, scales and head repetition."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch.fx

from subquad.ir.graph import dtype_of, shape_of
from subquad.ir.site import Operand
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.frame import DIM, Frame, Indices
from subquad.passes.recognize.index_map import IndexMap
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_frame import constant_of

Node = torch.fx.Node


@dataclass(frozen=True)
class Peeled:
    """An operand behind its views: its canonical axes, how many query heads share one of its heads, the factor taken out."""

    operand: Operand
    repeats: int
    factor: float
    passed: tuple[Node, ...]


def peel(node: Node, indices: Indices, frame: Frame, time: int | None, algebra: MaskAlgebra | None) -> list[Peeled]:
    """Every tensor with clean (batch, time, head, dim) axes on the walk back from a product's operand, the earliest last.

    indices: formulas of the operand's indices in the frame's digits and DIM.  time: the frame's axis that is its time.
    Multiplications by one number are taken out as a factor when `algebra` is there to read numbers; values keep theirs.
    Raises NotAttention when the operand is not a tensor with those axes.
    """
    here = IndexMap(node, indices)
    dim = next((size for size, index in zip(shape_of(node) or (), indices, strict=True) if index == DIM), 1)
    found: list[Peeled] = []
    packed: list[Peeled] = []
    passed: list[Node] = []
    factor = 1.0
    while True:
        read = frame.axes(shape_of(here.node) or (), here.indices, time, dim)
        if read is not None:
            found.append(Peeled(Operand(here.node, read.axes), read.repeats, factor, tuple(passed)))
        elif not found:
            shape, parts, mixed = frame.unpacked(shape_of(here.node) or (), here.indices, dim)
            split = frame.axes(shape, parts, time, dim) if mixed else None
            if split is not None:
                operand = Operand(here.node, split.axes, mixed)
                packed.append(Peeled(operand, split.repeats, factor, tuple(passed)))
        before = frame.traced(here) or _uncast(here)
        if before is None:
            scaled = None if algebra is None else _scaled(here.node, algebra)
            if scaled is None:
                break
            before, factor = IndexMap(scaled[0], here.indices), factor * scaled[1]
        passed.append(here.node)
        here = before
    if not found and not packed:
        raise NotAttention("an operand of the product has axes that are not batch, time, head and dim", node, "layout")
    return found or packed


def alike(keys: list[Peeled], values: list[Peeled], node: Node) -> tuple[Peeled, Peeled]:
    """The earliest keys and values whose heads are repeated equally often, as one operator takes them."""
    for repeats in sorted({k.repeats for k in keys} & {v.repeats for v in values}, reverse=True):
        return tuple([p for p in side if p.repeats == repeats][-1] for side in (keys, values))  # type: ignore[return-value]
    raise NotAttention("keys and values repeat their heads differently", node, "heads")


def _uncast(here: IndexMap) -> IndexMap | None:
    """One step back through a cast to the dtype that the tensor has already."""
    if kind(here.node) != "cast":
        return None
    source = arguments(here.node)["x"]
    return IndexMap(source, here.indices) if dtype_of(source) == dtype_of(here.node) else None


def _scaled(node: Node, algebra: MaskAlgebra) -> tuple[Node, float] | None:
    if kind(node) not in ("mul", "div"):
        return None
    a = arguments(node)
    if isinstance(a["a"], Node) and shape_of(a["a"]) is not None and a.get("rounding_mode") is None:
        number = constant_of(a["b"], algebra)
        if number and _same_shape(a["a"], node):
            return a["a"], 1 / number if kind(node) == "div" else number
    if kind(node) == "mul" and isinstance(a["b"], Node):
        number = constant_of(a["a"], algebra)
        if number and _same_shape(a["b"], node):
            return a["b"], number
    return None


def _same_shape(a: Node, b: Node) -> bool:
    return str(shape_of(a)) == str(shape_of(b))


def size_of_axes(operand: Operand, role: int) -> sympy.Basic | int:
    """The size of canonical axis `role` (batch, time, head, dim) of an operand; one when it is absent."""
    shape = operand.shape
    total = 1
    for axis in operand.axes[role]:
        total = total * shape[axis]
    return total
