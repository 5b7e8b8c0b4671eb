"""Find q, k and v behind their views, scales and head repetition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.mask import B, FloorDiv, H
from subquad.ir.site import Operand
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.index_map import IndexMap, trace_view
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.product import DIM, TIME
from subquad.passes.recognize.score_chain import NotAttention, constant_of

Node = torch.fx.Node


@dataclass(frozen=True)
class Peeled:
    """An operand behind its views: its canonical axes, how many query heads share one of its heads, the factor taken out."""

    operand: Operand
    repeats: int
    factor: float
    passed: tuple[Node, ...]


def peel(node: Node, axes: tuple[sympy.Symbol | None, ...], heads: int, algebra: MaskAlgebra | None) -> Peeled:
    """Walk back from a product's operand to the earliest tensor with clean (batch, time, head, dim) axes.

    axes: for each axis of `node` the symbol B, H, TIME or DIM.  heads: query heads.  Multiplications by one number are
    taken out as a factor when `algebra` is there to read numbers; values keep theirs.
    Raises NotAttention when the operand is not a tensor with those axes.
    """
    here = IndexMap(node, tuple(sympy.S.Zero if a is None else a for a in axes))
    best = _read(here, heads)
    if best is None:
        raise NotAttention("an operand of the product has axes that are not batch, time, head and dim", node)
    passed: list[Node] = []
    kept = 0
    factor = pending = 1.0
    while True:
        before = trace_view(here)
        if before is None:
            scaled = None if algebra is None else _scaled(here.node, algebra)
            if scaled is None:
                break
            before, pending = IndexMap(scaled[0], here.indices), pending * scaled[1]
        passed.append(here.node)
        here = before
        clean = _read(here, heads)
        if clean is not None:
            best, factor, kept = clean, pending, len(passed)
    return Peeled(best[0], best[1], factor, tuple(passed[:kept]))


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


def _read(here: IndexMap, heads: int) -> tuple[Operand, int] | None:
    """The canonical axes of a tensor whose indices are clean, with the head repetition; None when they are not."""
    place: dict[Any, int] = {}
    repeats = heads
    for n, index in enumerate(here.indices):
        if index == 0:
            continue
        name = index
        if isinstance(index, FloorDiv) and index.args[0] == H and index.args[1].is_Integer:
            name, repeats = H, int(index.args[1])
        elif index == H:
            repeats = 1
        if name in place or name not in (B, H, TIME, DIM):
            return None
        place[name] = n
    if TIME not in place or DIM not in place:
        return None
    shape = shape_of(here.node) or ()
    used = set(place.values())
    if any(n not in used and not (isinstance(size, int) and size == 1) for n, size in enumerate(shape)):
        return None
    if H in place and isinstance(shape[place[H]], int) and shape[place[H]] * repeats != heads:
        return None
    return Operand(here.node, (place.get(B), place[TIME], place.get(H), place[DIM])), repeats
