"""Find heads that the scores count together with the batch, or alone in front of the queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy

from subquad.ir.graph import shape_of
from subquad.ir.mask import FloorDiv
from subquad.passes.recognize.frame import DIM, Frame, Indices, digit, digits
from subquad.passes.recognize.index_map import IndexMap
from subquad.passes.recognize.symbolic_tensor import is_one, size_of

Parts = tuple[tuple[Any, ...], Indices]


def splits(frame: Frame, operands: tuple[IndexMap, ...]) -> Iterator[Parts]:
    """Each way to split a batch axis of the scores in two, as (sizes of the axes, formulas of the indices).

    operands: queries and keys, their indices in the frame's digits.  They tell by how they were merged: an axis that an
    earlier tensor reads as a quotient and a remainder by m counts m inner things.
    """
    for place in frame.wide(frame.batch):
        seen = set[sympy.Basic]()
        for steps in (_walk(frame, operand) for operand in operands):
            for inner in _divisors(steps, digit(place)):
                sizes = None if inner in seen else _sizes(frame, steps, place, inner)
                seen.add(inner)
                if sizes is not None:
                    shape = (*frame.shape[:place], *sizes, *frame.shape[place + 1 :])
                    marks = list(digits(shape))
                    merged = marks.pop(place) * inner + marks[place]
                    marks[place] = merged
                    yield shape, tuple(marks)


def is_head(frame: Frame, place: int, operands: tuple[IndexMap, ...]) -> bool:
    """True for an axis of fixed size that the operands do not count with tokens, and that one of them splits off features.

    Not for one that an operand reads as a batch and a head.
    """
    if not isinstance(frame.shape[place], int) or is_one(frame.shape[place]):
        return False
    if any(_is_two(step, digit(place)) for operand in operands for step in _walk(frame, operand)):
        return False
    tokens = {digit(n) for n in (frame.query, frame.key) if n is not None}
    beside = False
    for operand in operands:
        for step in _walk(frame, operand):
            for index in step.indices:
                if digit(place) in index.free_symbols:
                    if index.free_symbols & tokens:
                        return False
                    beside = beside or DIM in index.free_symbols
    return beside


def _walk(frame: Frame, start: IndexMap) -> list[IndexMap]:
    steps = [start]
    while (before := frame.traced(steps[-1])) is not None:
        steps.append(before)
    return steps


def _divisors(steps: list[IndexMap], index: sympy.Symbol) -> list[sympy.Basic]:
    found: list[sympy.Basic] = []
    for step in steps:
        for formula in step.indices:
            for part in formula.atoms(FloorDiv, sympy.Mod):
                if part.args[0] == index and part.args[1] not in found:
                    found.append(part.args[1])
    return found


def _is_two(step: IndexMap, index: sympy.Symbol) -> bool:
    """True when the tensor has the quotient of an index on one axis and its remainder on another."""
    parts = [{part for part in formula.atoms(FloorDiv, sympy.Mod) if part.args[0] == index} for formula in step.indices]
    quotients = {part.args[1] for found in parts for part in found if isinstance(part, FloorDiv)}
    remainders = {part.args[1] for found in parts for part in found if isinstance(part, sympy.Mod)}
    return bool(quotients & remainders)


def _sizes(frame: Frame, steps: list[IndexMap], place: int, inner: sympy.Basic) -> tuple[Any, Any] | None:
    """The sizes of the outer and the inner part, as numbers or as sizes that an earlier tensor has."""
    outer = sympy.cancel(size_of(frame.shape[place]) / inner)
    if not outer.is_polynomial() or not outer.is_integer:
        return None
    wanted = ((outer, FloorDiv(digit(place), inner)), (inner, sympy.Mod(digit(place), inner)))
    found = [int(size) if size.is_Integer else _size_of_axis(steps, index, size) for size, index in wanted]
    return None if None in found else (found[0], found[1])


def _size_of_axis(steps: list[IndexMap], index: sympy.Basic, size: sympy.Basic) -> Any:
    for step in steps:
        for held, formula in zip(shape_of(step.node) or (), step.indices, strict=True):
            if formula == index and size_of(held) == size:
                return held
    return None
