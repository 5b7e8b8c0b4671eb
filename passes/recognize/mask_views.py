"""Rules of the mask algebra that move indices: views, slices, flips and repetitions."""

from __future__ import annotations

from typing import Any

import sympy
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.index_map import IndexMap, trace_view
from subquad.passes.recognize.mask_choice import NoFormula
from subquad.passes.recognize.mask_gathers import gathered
from subquad.passes.recognize.mask_relation import never_negative
from subquad.passes.recognize.mask_rules import Operation, rule
from subquad.passes.recognize.symbolic_tensor import SymbolicTensor, axis, is_one, size_of

Node = torch.fx.Node


@rule("unsqueeze", "squeeze", "view", "flatten", "unflatten", "transpose", "t", "permute", "movedim", "repeat",
      "repeat_interleave")  # fmt: skip
def _view(op: Operation) -> sympy.Basic | None:
    start = IndexMap(op.node, tuple(sympy.S.Zero if is_one(size) else axis(n) for n, size in enumerate(op.shape)))
    moved = trace_view(start)
    return None if moved is None else op.algebra.read(moved.node).at(moved.indices)


@rule("expand", "expand_as")
def _expansion(op: Operation) -> sympy.Basic:
    return op.element("x")


def first_index(op: Operation, value: Any, size: Any) -> sympy.Basic:
    """Where a slice begins, as Python counts: from the end when negative, never before the beginning."""
    start = sympy.S.Zero if value is None else op.algebra.size(value)
    if never_negative(start):
        return start
    if not never_negative(-1 - start):
        raise NoFormula
    whole = size_of(size) + start
    if isinstance(size, int) and start.is_Integer:
        return max(whole, sympy.S.Zero)
    return whole if start == -1 else sympy.Max(whole, 0)


def one_index(op: Operation, value: Any, size: Any) -> sympy.Basic:
    """One place on an axis, which the operation itself checks to be inside."""
    index = op.algebra.size(value)
    if never_negative(index):
        return index
    if never_negative(-1 - index):
        return size_of(size) + index
    raise NoFormula


@rule("slice", "narrow")
def _slice(op: Operation) -> sympy.Basic | None:
    if op.is_tensor("start"):
        return None
    base = op.read("x")
    place = op.axis_number(op["dim"])
    step = op.algebra.size(op.arguments.get("step", 1))
    start = first_index(op, op["start"], base.shape[place])
    return _at(base, {place: start + step * axis(place)})


@rule("select")
def _select(op: Operation) -> sympy.Basic | None:
    if op.is_tensor("index"):
        return None
    base = op.read("x")
    place = op["dim"] % base.rank
    index = one_index(op, op["index"], base.shape[place])
    indices = (*_here(base, place), index, *(axis(n - 1) for n in range(place + 1, base.rank)))
    return base.at(_flat(base, indices))


def _here(base: SymbolicTensor, count: int) -> tuple[sympy.Basic, ...]:
    return tuple(axis(n) for n in range(count))


def _flat(base: SymbolicTensor, indices: tuple[sympy.Basic, ...]) -> tuple[sympy.Basic, ...]:
    """Index zero on axes of size one."""
    return tuple(sympy.S.Zero if is_one(size) else index for size, index in zip(base.shape, indices, strict=True))


def _at(base: SymbolicTensor, changed: dict[int, sympy.Basic]) -> sympy.Basic:
    return base.at(_flat(base, tuple(changed.get(n, axis(n)) for n in range(base.rank))))


@rule("flip")
def _flip(op: Operation) -> sympy.Basic:
    base = op.read("x")
    dims = op["dims"] if isinstance(op["dims"], list | tuple) else [op["dims"]]
    places = [op.axis_number(dim) for dim in dims]
    return _at(base, {n: size_of(base.shape[n]) - 1 - axis(n) for n in places})


@rule("roll")
def _roll(op: Operation) -> sympy.Basic | None:
    base = op.read("x")
    shifts, dims = (v if isinstance(v, list | tuple) else [v] for v in (op["shifts"], op["dims"]))
    if not dims or dims[0] is None or len(dims) != len(shifts) or len(set(dims)) != len(dims):
        return None
    changed = {}
    for shift, dim in zip(shifts, dims, strict=True):
        n = op.axis_number(dim)
        changed[n] = sympy.Mod(axis(n) - op.algebra.size(shift), size_of(base.shape[n]))
    return _at(base, changed)


@rule("getitem")
def _getitem(op: Operation) -> sympy.Basic | None:
    if shape_of(op["x"]) is None:
        return _piece(op)
    items = list(op["index"]) if isinstance(op["index"], list | tuple) else [op["index"]]
    base = op.read("x")
    if any(isinstance(item, bool) for item in items):
        return None
    tensors = [item for item in items if isinstance(item, Node) and shape_of(item) is not None]
    named = sum(item is not None and item is not Ellipsis for item in items)
    rest = [slice(None)] * (base.rank - named)
    items = _spelled_out(items, rest)
    basic: list[sympy.Basic] = []
    picks: list[Node | None] = []
    shape: list[Any] = []
    for item in items:
        if item is None:
            shape.append(1)
            picks.append(None)
            continue
        size = base.shape[len(basic)]
        if isinstance(item, slice):
            step = op.algebra.size(item.step or 1)
            index = axis(len(shape))
            basic.append(sympy.S.Zero if is_one(size) else first_index(op, item.start, size) + step * index)
        elif isinstance(item, Node) and shape_of(item) is not None:
            basic.append(sympy.S.Zero if is_one(size) else axis(len(shape)))
        elif tensors:
            return None
        else:
            basic.append(one_index(op, item, size))
            continue
        shape.append(size)
        picks.append(item if isinstance(item, Node) else None)
    view = SymbolicTensor(base.at(tuple(basic)), tuple(shape))
    return gathered(op, view, picks) if tensors else view.expression


def _spelled_out(items: list[Any], rest: list[slice]) -> list[Any]:
    places = [n for n, item in enumerate(items) if item is Ellipsis]
    if not places:
        return items + rest
    return items[: places[0]] + rest + items[places[0] + 1 :]


def _piece(op: Operation) -> sympy.Basic | None:
    """One result of an operation that has several: unbind, split, chunk, meshgrid."""
    whole, number = op["x"], op["index"]
    name = kind(whole)
    if not isinstance(number, int):
        return None
    if name == "meshgrid":
        return _grid(op, arguments(whole), number)
    if name == "broadcast_tensors":
        return op.algebra.element(arguments(whole)["tensors"][number], op.shape)
    if name not in ("unbind", "split", "chunk"):
        return None
    a = arguments(whole)
    base = op.algebra.read(a["x"])
    place = a["dim"] % base.rank
    if name == "unbind":
        indices = (*_here(base, place), sympy.Integer(number), *(axis(n - 1) for n in range(place + 1, base.rank)))
        return None if number < 0 else base.at(_flat(base, indices))
    size = base.shape[place]
    widths = a["size"] if name == "split" else -(-size // a["chunks"]) if isinstance(size, int) else None
    if widths is None or number < 0:
        return None
    before = sum(widths[:number]) if isinstance(widths, list | tuple) else widths * number
    return _at(base, {place: axis(place) + op.algebra.size(before)})


def _grid(op: Operation, a: dict[str, Any], number: int) -> sympy.Basic | None:
    if number < 0 or a.get("indexing") not in (None, "ij", "xy"):
        return None
    part = op.algebra.read(a["tensors"][number])
    place = {0: 1, 1: 0}.get(number, number) if a.get("indexing") == "xy" else number
    return part.at((axis(place),) if part.rank else ())
