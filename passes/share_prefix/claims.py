"""What can be claimed of a tensor: in which of its elements the rows of a batch agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch.fx

from subquad.passes.recognize.mixed_radix import without_divisions
from subquad.passes.recognize.symbolic_tensor import axis, is_one, size_of

ROW = sympy.Symbol("r", integer=True, nonnegative=True)
"""The number of a row, in the formula of its group."""


@dataclass(frozen=True)
class Shared:
    """The element at (i0, i1, …) is equal for all rows of a group while its column is below `columns`.

    row, column: formulas of the indices; column is None where every element is shared, and `columns` is then infinite.
    group: formula of ROW; rows of equal value form a group, zero makes all rows one group.
    """

    row: sympy.Basic
    column: sympy.Basic | None
    columns: sympy.Basic
    group: sympy.Basic

    @property
    def symbols(self) -> set[sympy.Basic]:
        """The indices that tell rows and columns apart."""
        return set(self.row.free_symbols) | (set() if self.column is None else set(self.column.free_symbols))

    def moved(self, places: Mapping[int, int]) -> Shared:
        """The claim of a tensor whose axes stand at other places."""
        return self.at({axis(old): axis(new) for old, new in places.items()})

    def at(self, indices: Mapping[sympy.Basic, sympy.Basic]) -> Shared:
        """The claim with formulas put for its indices."""
        column = None if self.column is None else self.column.xreplace(dict(indices))
        return replace(self, row=self.row.xreplace(dict(indices)), column=column)


Claims = dict[torch.fx.Node, Shared]
Sizes = set[sympy.Basic]
"""Sizes that count the rows of the batch."""


def everywhere(place: int, group: sympy.Basic = sympy.S.Zero) -> Shared:
    """All elements agree between the rows of a group, which are counted by the axis at `place`."""
    return Shared(axis(place), None, sympy.oo, group)


def meet(claims: Sequence[Shared]) -> Shared | None:
    """What holds where all claims hold; None when they speak of different rows or columns, or of unrelated groups."""
    first, *rest = claims
    for other in rest:
        if first.row != other.row:
            return None
        if first.column is not None and other.column is not None and first.column != other.column:
            return None
        group = finer(first.group, other.group)
        if group is None:
            return None
        column = other.column if first.column is None else first.column
        first = Shared(first.row, column, sympy.Min(first.columns, other.columns), group)
    return first


def finer(one: sympy.Basic, other: sympy.Basic) -> sympy.Basic | None:
    """The grouping that divides the rows into both; None when neither divides the other."""
    if one == other or other == 0:
        return one
    return other if one == 0 else None


def settled(claim: Shared, shape: Sequence[Any]) -> Shared | None:
    """The claim for a tensor of this shape, its column one index counted from zero.

    None when the row is no longer told by an index, or when no column is surely shared.
    """
    sizes = {axis(n): size_of(size) for n, size in enumerate(shape)}
    single = {axis(n): sympy.S.Zero for n, size in enumerate(shape) if is_one(size)}
    row = without_divisions(claim.row.xreplace(single), sizes)
    if not row.free_symbols & set(sizes):
        return None
    if claim.column is None:
        return replace(claim, row=row)
    column = without_divisions(claim.column.xreplace(single), sizes)
    offset, index = column.as_independent(*sizes, as_Add=True)
    columns = claim.columns - offset
    if index == 0:
        return Shared(row, None, sympy.oo, claim.group) if columns.is_positive else None
    return None if columns.is_nonpositive else Shared(row, index, columns, claim.group)
