"""Rules of the mask algebra for elements picked by a tensor of indices."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of
from subquad.passes.recognize.mask_choice import NoFormula, choose, spread
from subquad.passes.recognize.mask_relation import never_negative, reads, relate
from subquad.passes.recognize.mask_rules import Operation, rule
from subquad.passes.recognize.symbolic_tensor import SymbolicTensor, as_number, axis, is_one, size_of

Node = torch.fx.Node
INDEX_TYPES = (torch.int64, torch.int32)


def gathered(op: Operation, base: SymbolicTensor, picks: Sequence[Node | None]) -> sympy.Basic:
    """base[picks], None for a whole axis, as torch lays the result out.

    Raises NoFormula for boolean indices, and for indices read from a table into what is itself not a plain index.
    """
    places = [n for n, pick in enumerate(picks) if pick is not None]
    tensors = [(op.algebra.read(picks[n]), picks[n]) for n in places]  # type: ignore[arg-type]
    if any(dtype_of(node) not in INDEX_TYPES for _, node in tensors):
        raise NoFormula
    width = max(tensor.rank for tensor, _ in tensors)
    together = places == list(range(places[0], places[-1] + 1))
    first = places[0] if together else 0
    inner = op.shape[first : first + width]
    shifted = {axis(n): axis(n + first) for n in range(width)}
    formulas = [as_number(tensor.broadcast(inner)).xreplace(shifted) for tensor, _ in tensors]
    others = iter([axis(n) for n in range(op.rank) if not first <= n < first + width])
    whole = [None if n in places else next(others) for n in range(base.rank)]
    return picked(base, places, formulas, whole)


def picked(
    base: SymbolicTensor, places: Sequence[int], formulas: Sequence[sympy.Basic], whole: Sequence[sympy.Basic | None]
) -> sympy.Basic:
    """The base's element at `formulas` on the axes `places`, negative ones counted from the end, and at `whole` elsewhere."""
    sizes = [size_of(base.shape[n]) for n in places]
    wrapped = [_wrapped(index, size) for index, size in zip(formulas, sizes, strict=True)]

    def element(*found: sympy.Basic) -> sympy.Basic:
        at = dict(zip(places, found, strict=True))
        indices = (at[n] if n in at else whole[n] for n in range(base.rank))
        return base.at(tuple(sympy.S.Zero if is_one(base.shape[n]) else i for n, i in enumerate(indices)))  # type: ignore[misc]

    return spread(element, wrapped)


def _wrapped(index: sympy.Basic, size: sympy.Basic) -> sympy.Basic:
    def leaf(i: sympy.Basic) -> sympy.Basic:
        if reads(i) or not i.is_integer:
            raise NoFormula
        if never_negative(i):
            return i
        if never_negative(-1 - i):
            return i + size
        return choose(relate("ge", i, sympy.S.Zero), i, i + size)

    return spread(leaf, (index,))


@rule("index")
def _index(op: Operation) -> sympy.Basic:
    base = op.read("x")
    picks = list(op["indices"])
    return gathered(op, base, picks + [None] * (base.rank - len(picks)))


@rule("index_select")
def _index_select(op: Operation) -> sympy.Basic:
    base = op.read("x")
    place = op["dim"] % base.rank
    return gathered(op, base, [op["index"] if n == place else None for n in range(base.rank)])


@rule("gather")
def _gather(op: Operation) -> sympy.Basic | None:
    """x.gather(dim, index), and take_along_dim where nothing is broadcast."""
    base, index = op.read("x"), op.read("index")
    if op["dim"] is None or base.rank != op.rank or index.rank != op.rank or dtype_of(op["index"]) not in INDEX_TYPES:
        return None
    place = op.axis_number(op["dim"])
    whole = [axis(n) for n in range(op.rank)]
    return picked(base, [place], [as_number(index.broadcast(op.shape))], whole)
