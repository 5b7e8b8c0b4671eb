"""Rules of the mask algebra for tensors put together from parts: concatenation, stacking, padding, writes into slices."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of, rank_of
from subquad.passes.recognize.mask_arithmetic import kept
from subquad.passes.recognize.mask_choice import NoFormula, choose, is_boolean, spread
from subquad.passes.recognize.mask_relation import conjoin, relate
from subquad.passes.recognize.mask_rules import Operation, rule
from subquad.passes.recognize.mask_views import first_index, one_index
from subquad.passes.recognize.symbolic_tensor import SymbolicTensor, as_condition, as_number, axis, is_one, size_of

Node = torch.fx.Node
MOST_PARTS = 8


def copied(op: Operation, value: sympy.Basic, dtype: torch.dtype | None) -> sympy.Basic:
    """What of another dtype is copied into the result, as the result's dtype holds it."""
    if op.dtype == torch.bool:
        return as_condition(value)
    if dtype == op.dtype:
        return as_number(value)
    return spread(lambda x: kept(x, op.dtype), (as_number(value),))


def _shifted(part: SymbolicTensor, place: int, start: sympy.Basic) -> sympy.Basic:
    return part.at(
        tuple(
            sympy.S.Zero if is_one(size) else axis(n) - start if n == place else axis(n)
            for n, size in enumerate(part.shape)
        )
    )


@rule("cat", "hstack", "vstack")
def _concatenation(op: Operation) -> sympy.Basic | None:
    nodes = list(op["tensors"])
    if any(rank_of(node) != op.rank for node in nodes):
        return None
    if op.kind == "cat":
        place = op.axis_number(op["dim"])
    else:
        place = 1 if op.kind == "hstack" and op.rank > 1 else 0
    parts = [op.algebra.read(node) for node in nodes]
    starts: list[sympy.Basic] = [sympy.S.Zero]
    for part in parts:
        starts.append(starts[-1] + size_of(part.shape[place]))
    values = [
        copied(op, _shifted(part, place, start), dtype_of(node))
        for part, start, node in zip(parts, starts, nodes, strict=False)
    ]
    if all(
        _continues(values[0], value, place, start if is_one(part.shape[place]) else None)
        for part, value, start in zip(parts, values, starts, strict=False)
    ):
        return values[0]
    if len(parts) > MOST_PARTS:
        return None
    ends = [op.inside(relate("lt", axis(place), end)) for end in starts[1:-1]]
    return _pieces(values, ends)


def _continues(whole: sympy.Basic, part: sympy.Basic, place: int, at: sympy.Basic | None) -> bool:
    """True when a part carries on the first one's formula; `at`: where a part of length one is."""
    if at is not None:
        whole = whole.xreplace({axis(place): at})
    if is_boolean(whole) or is_boolean(part):
        return bool(whole == part)
    return bool(whole == part or sympy.expand(whole - part) == 0)


def _pieces(values: Sequence[sympy.Basic], ends: Sequence[sympy.Basic]) -> sympy.Basic:
    found = values[-1]
    for value, before in zip(reversed(values[:-1]), reversed(ends), strict=True):
        found = choose(before, value, found)
    return found


@rule("stack")
def _stack(op: Operation) -> sympy.Basic | None:
    nodes = list(op["tensors"])
    if len(nodes) > MOST_PARTS:
        return None
    place = op.axis_number(op["dim"])
    others = tuple(axis(n) for n in range(op.rank) if n != place)
    values = [copied(op, op.algebra.read(node).at(others), dtype_of(node)) for node in nodes]
    return _pieces(values, [relate("eq", axis(place), sympy.Integer(n)) for n in range(len(values) - 1)])


@rule("pad")
def _padding(op: Operation) -> sympy.Basic | None:
    """A border of one value; what is cut off by a negative width is gone."""
    if op.arguments.get("mode", "constant") != "constant":
        return None
    base, widths = op.read("x"), list(op["pad"])
    inside: list[sympy.Basic] = []
    indices: list[sympy.Basic] = [axis(n) for n in range(op.rank)]
    for number in range(len(widths) // 2):
        place = op.rank - 1 - number
        before = op.algebra.size(widths[2 * number])
        inside.append(relate("ge", axis(place), before))
        inside.append(relate("lt", axis(place), before + size_of(base.shape[place])))
        indices[place] = sympy.S.Zero if is_one(base.shape[place]) else axis(place) - before
    value = op.algebra.element(op["value"] if op["value"] is not None else 0, ())
    return choose(op.inside(conjoin(*inside)), copied(op, base.at(tuple(indices)), op.dtype), copied(op, value, None))


@rule("slice_scatter")
def _written_slice(op: Operation) -> sympy.Basic | None:
    if op.algebra.size(op["step"]) != 1:
        return None
    source = op.read("src")
    place = op.axis_number(op["dim"])
    start = first_index(op, op["start"], op.shape[place])
    length = size_of(source.shape[place])
    written = op.inside(conjoin(relate("ge", axis(place), start), relate("lt", axis(place), start + length)))
    value = copied(op, _shifted(source, place, start), dtype_of(op["src"]))
    return choose(written, value, op.element("x"))


@rule("select_scatter")
def _written_row(op: Operation) -> sympy.Basic:
    source = op.read("src")
    place = op["dim"] % op.rank
    index = one_index(op, op["index"], op.shape[place])
    value = copied(op, source.at(tuple(axis(n) for n in range(op.rank) if n != place)), dtype_of(op["src"]))
    return choose(relate("eq", axis(place), index), value, op.element("x"))


@rule("index_put")
def _written_where(op: Operation) -> sympy.Basic | None:
    """x[condition] = one value."""
    indices = op["indices"]
    if len(indices) != 1 or op.arguments.get("accumulate") or dtype_of(indices[0]) != torch.bool:
        return None
    if rank_of(indices[0]) != op.rank or (isinstance(op["values"], Node) and rank_of(op["values"]) != 0):
        return None
    condition = as_condition(op.algebra.element(indices[0], op.shape))
    value = copied(op, op.algebra.element(op["values"], op.shape), dtype_of(op["values"]))
    return choose(condition, value, op.element("x"))


@rule("copy")
def _copy(op: Operation) -> sympy.Basic:
    if not op.is_tensor("src"):
        raise NoFormula
    return copied(op, op.element("src"), dtype_of(op["src"]))


@rule("fill")
def _fill(op: Operation) -> sympy.Basic:
    return copied(op, op.element("value"), dtype_of(op["value"]))
