"""Tensors that meet the scores while one axis of these is viewed as several, as a picture's rows and columns are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from subquad.ir.site import View
from subquad.passes.recognize.frame import Frame, Indices
from subquad.passes.recognize.mixed_radix import quotient_and_rest
from subquad.passes.recognize.symbolic_tensor import is_one, size_of


def laid_out(frame: Frame, shape: Sequence[Any], sizes: Sequence[Any], place: Indices) -> tuple[View, ...] | None:
    """Steps that lay a tensor out as Frame.views does, first expanded and flattened to whole axes of the frame.

    shape: the tensor's, aligned at the right with the scores where it meets them.  sizes, place: the scores' sizes there,
    and formulas of their indices.
    """
    groups = _groups(frame, sizes, place)
    if groups is None:
        return None
    steps = [View("unsqueeze", (0,))] * (len(place) - len(shape))
    full = [*[1] * len(steps), *shape]
    whole: list[Any] = []
    at: list[sympy.Basic] = []
    for places, index in groups:
        here = len(whole)
        held = [full[n] for n in places]
        if len(places) > 1:
            if not all(map(is_one, held)):
                steps += [
                    View("expand", (here + m, sizes[n]))
                    for m, n in enumerate(places)
                    if is_one(full[n]) and not is_one(sizes[n])
                ]
                held = [frame.shape[int(str(index)[1:])]]
            steps.append(View("flatten", (here, here + len(places) - 1)))
        whole.append(held[0])
        at.append(index)
    rest = frame.views(whole, len(at), tuple(at))
    return None if rest is None else (*steps, *rest)


def _groups(frame: Frame, sizes: Sequence[Any], place: Indices) -> list[tuple[list[int], sympy.Basic]] | None:
    """The axes in groups that each count through one axis of the frame, and that axis's index; None when they do not."""
    groups: list[tuple[list[int], sympy.Basic]] = []
    first = 0
    while first < len(place):
        index, end = place[first], first + 1
        if index != 0 and not frame.digits_of(index):
            if len(index.free_symbols) != 1:
                return None
            while end < len(place) and place[end].free_symbols == index.free_symbols:
                end += 1
            (index,) = index.free_symbols
            if _counted(index, sizes[first:end], frame) != tuple(place[first:end]):
                return None
        groups.append((list(range(first, end)), index))
        first = end
    return groups


def _counted(index: sympy.Basic, sizes: Sequence[Any], frame: Frame) -> Indices:
    """The indices of axes of these sizes that an index counts through."""
    found: list[sympy.Basic] = []
    for size in reversed(sizes[1:]):
        index, last = quotient_and_rest(index, size_of(size), frame.sizes)
        found.insert(0, last)
    return (index, *found)
