"""Follow many elements of a tensor at once back through views: exact integer indices along one axis, symbols along others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch.fx

from subquad.ir.graph import shape_of, value_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.index_map import IndexMap, trace_view
from subquad.passes.recognize.symbolic_tensor import is_one, size_of

Node = torch.fx.Node
SIMPLE = frozenset(
    ["contiguous", "cast", "unsqueeze", "squeeze", "expand", "transpose", "t", "permute", "movedim", "slice", "select", "narrow"]
)  # fmt: skip
REGROUPED = frozenset(["view", "flatten", "unflatten"])


@dataclass(frozen=True, eq=False)
class Index:
    """Indices along one axis, one per lane: values[lane] + Σ coefficient · token.

    A token is the name of an axis that all lanes share (a batch, a time, a head), whose index stays symbolic.
    """

    values: np.ndarray
    terms: tuple[tuple[str, Any], ...] = ()

    def __add__(self, other: Any) -> Index:
        if isinstance(other, Index):
            terms = dict(self.terms)
            for token, factor in other.terms:
                terms[token] = terms.get(token, 0) + factor
            return Index(self.values + other.values, tuple(terms.items()))
        if isinstance(other, int) or (isinstance(other, sympy.Basic) and other.is_Integer):
            return Index(self.values + int(other), self.terms)
        return Index(self.values, (*self.terms, (f"+{other}", 1)))

    __radd__ = __add__

    def __mul__(self, factor: Any) -> Index:
        if isinstance(factor, int) or factor.is_Integer:
            factor = int(factor)
            return Index(self.values * factor, tuple((t, f * factor) for t, f in self.terms) if factor else ())
        if self.values.any():
            raise ValueError("numbers times a symbolic size")
        return Index(self.values, tuple((t, f * factor) for t, f in self.terms))

    __rmul__ = __mul__

    def take(self, kept: np.ndarray) -> Index:
        """The indices of some of the lanes."""
        return Index(self.values[kept], self.terms)

    @property
    def token(self) -> str | None:
        """The one token this index is, when it is nothing else."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and not self.values.any():
            return self.terms[0][0]
        return None

    @property
    def is_zero(self) -> bool:
        """True for index zero in every lane."""
        return not self.terms and not self.values.any()


Indices = tuple[Index, ...]


def trace_lanes(node: Node, indices: Indices, sizes: dict[str, Any]) -> tuple[Node, Indices] | None:
    """One step back through a view, a cast or a part of a split; None when the node is none, or mixes what it may not.

    sizes: of every token.
    """
    name = kind(node)
    try:
        if name in SIMPLE or name == "getitem":
            return _simple(node, name, indices)
        if name in REGROUPED:
            base = arguments(node)["x"]
            moved = _regroup(indices, shape_of(base) or (), shape_of(node) or (), sizes)
            return None if moved is None else (base, moved)
        if name in ("repeat_interleave", "repeat"):
            return _repeated(node, name, indices, sizes)
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return None


def _simple(node: Node, name: str, indices: Indices) -> tuple[Node, Indices] | None:
    a = arguments(node)
    base = a["x"]
    if name == "cast":
        return (base, indices) if shape_of(base) is not None else None
    if name == "getitem" and kind(base) in ("split", "split_with_sizes", "chunk"):
        return _part(node, base, a["index"], indices)
    traced = trace_view(IndexMap(node, indices))  # type: ignore[arg-type]
    if traced is None:
        return None
    lanes = len(indices[0].values) if indices else 1
    return traced.node, tuple(constant(i, lanes) for i in traced.indices)


def constant(index: Any, lanes: int) -> Index:
    """An index formula that a view inserted, the same in every lane."""
    if isinstance(index, Index):
        return index
    return Index(np.zeros(lanes, dtype=np.int64)) + index


def _part(node: Node, split: Node, number: Any, indices: Indices) -> tuple[Node, Indices] | None:
    a = arguments(split)
    base, parts = a["x"], value_of(split)
    if not isinstance(number, int) or not isinstance(parts, (tuple, list)):
        return None
    along = a["dim"] % len(indices)
    number %= len(parts)
    begin = sum((size_of(part.shape[along]) for part in parts[:number]), sympy.S.Zero)
    return base, tuple(index + begin if n == along else index for n, index in enumerate(indices))


def _repeated(node: Node, name: str, indices: Indices, sizes: dict[str, Any]) -> tuple[Node, Indices] | None:
    a = arguments(node)
    base = a["x"]
    shape = shape_of(base) or ()
    if name == "repeat_interleave":
        if a["dim"] is None or not isinstance(a["repeats"], int):
            return None
        dim = a["dim"] % len(shape)
        divided = divide(indices[dim], a["repeats"], sizes)
        return None if divided is None else (base, (*indices[:dim], divided[0], *indices[dim + 1 :]))
    kept, offset = [], len(indices) - len(shape)
    for n, size in enumerate(shape):
        if is_one(size):
            kept.append(indices[n + offset] * 0)
            continue
        divided = divide(indices[n + offset], _size(size), sizes)
        if divided is None:
            return None
        kept.append(divided[1])
    return base, tuple(kept)


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else size_of(size)


def _regroup(indices: Indices, base: Sequence[Any], out: Sequence[Any], sizes: dict[str, Any]) -> Indices | None:
    """Both shapes hold the same elements in the same order: groups of axes with equal products share one flat index."""
    lanes = len(indices[0].values)
    zero = Index(np.zeros(lanes, dtype=np.int64))
    result = [zero] * len(base)
    left = [n for n, size in enumerate(base) if not is_one(size)]
    right = [n for n, size in enumerate(out) if not is_one(size)]
    while left and right:
        group, others = [left.pop(0)], [right.pop(0)]
        have, want = _size(base[group[0]]), _size(out[others[0]])
        while not _equal(have, want):
            if left and _is_smaller(have, want):
                group.append(left.pop(0))
                have = have * _size(base[group[-1]])
            elif right:
                others.append(right.pop(0))
                want = want * _size(out[others[-1]])
            else:
                return None
        if len(group) == len(others) == 1:
            result[group[0]] = indices[others[0]]
            continue
        rest = zero
        for n in others:
            rest = rest * _size(out[n]) + indices[n]
        for n in reversed(group[1:]):
            divided = divide(rest, _size(base[n]), sizes)
            if divided is None:
                return None
            rest, result[n] = divided
        result[group[0]] = rest
    return None if left or right else tuple(result)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(a - b) == 0)


def _is_smaller(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return bool(sympy.cancel(b / sympy.sympify(a)).is_integer)


def divide(index: Index, by: Any, sizes: dict[str, Any]) -> tuple[Index, Index] | None:
    """Quotient and remainder of an index; None when a token straddles both or the remainder might reach the divisor."""
    whole, rest = [], []
    for token, factor in index.terms:
        if isinstance(factor, int) and isinstance(by, int):
            multiple = factor // by if factor % by == 0 else None
        else:
            quotient = sympy.cancel(sympy.sympify(factor) / by)
            multiple = quotient if quotient.is_integer and quotient.is_polynomial() else None
        if multiple is None:
            rest.append((token, factor))
        else:
            whole.append((token, int(multiple) if sympy.sympify(multiple).is_Integer else multiple))
    if isinstance(by, int):
        high, low = np.divmod(index.values, by)
    else:
        high, low = np.zeros_like(index.values), index.values
    if any(token not in sizes for token, _ in rest) or (low.size and low.min() < 0):
        return None
    reach = sum((factor * (sizes[token] - 1) for token, factor in rest), int(low.max()) if low.size else 0)
    fits = reach < by if isinstance(reach, int) and isinstance(by, int) else sympy.expand(by - 1 - reach).is_nonnegative
    if not fits:
        return None
    return Index(high, tuple(whole)), Index(low, tuple(rest))
