"""The axes of a score tensor, the role each plays, and how other tensors are laid out along them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import sympy

from subquad.ir.mask import KV, B, FloorDiv, H, Q
from subquad.ir.site import CanonicalAxes, Packed, View
from subquad.passes.recognize.index_map import IndexMap, trace_view
from subquad.passes.recognize.mixed_radix import quotient_and_rest, without_divisions
from subquad.passes.recognize.symbolic_tensor import is_one, size_of

DIM = sympy.Symbol("dim", integer=True, nonnegative=True)
Indices = tuple[sympy.Basic, ...]


@cache
def digit(place: int) -> sympy.Symbol:
    """The index of a frame's axis."""
    return sympy.Symbol(f"a{place}", integer=True, nonnegative=True)


def digits(shape: Sequence[Any]) -> Indices:
    """The index of every axis of a tensor; zero for axes of size one."""
    return tuple(sympy.S.Zero if is_one(size) else digit(n) for n, size in enumerate(shape))


@dataclass(frozen=True)
class Frame:
    """The scores of one attention: which of their axes count batches, heads, queries and keys.

    shape: the sizes of the scores' axes.  query, key: places of these axes, None when the scores have none (one query).
    batch, heads: places of the others, outermost first; several axes of one role count together.
    """

    shape: tuple[Any, ...]
    batch: tuple[int, ...]
    heads: tuple[int, ...]
    query: int | None
    key: int
    sizes: dict[sympy.Symbol, sympy.Basic] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", {digit(n): size_of(size) for n, size in enumerate(self.shape)})

    @property
    def roles(self) -> tuple[tuple[int, ...], ...]:
        """Places of the axes of canonical scores (batch, head, query, key)."""
        return self.batch, self.heads, () if self.query is None else (self.query,), (self.key,)

    def with_keys(self, size: Any) -> Frame:
        """The same frame with the number of keys under another name: operands of one SDPA call count the same keys."""
        shape = tuple(size if n == self.key else held for n, held in enumerate(self.shape))
        return replace(self, shape=shape)

    def head_count(self) -> sympy.Basic:
        """The number of query heads."""
        return sympy.prod(self.sizes[digit(n)] for n in self.heads)

    def canonical(self, expression: sympy.Basic) -> sympy.Basic:
        """A formula of the frame's indices as one of b, h, q and kv."""
        named: dict[sympy.Basic, sympy.Basic] = {}
        for symbol, places in zip((B, H, Q, KV), self.roles, strict=True):
            inner: sympy.Basic = sympy.S.One
            for n, place in reversed(list(enumerate(places))):
                size = self.sizes[digit(place)]
                index = symbol if inner == 1 else FloorDiv(symbol, inner)
                named[digit(place)] = index if n == 0 else sympy.Mod(index, size)
                inner = inner * size
        return without_divisions(expression, self.sizes).xreplace(named)

    def digits_of(self, index: sympy.Basic) -> tuple[int, ...] | None:
        """The axes that an index counts through, outermost first (a·n + b → a, b); None for any other formula."""
        return _digits_of(index, tuple(self.sizes.values()))

    def traced(self, here: IndexMap) -> IndexMap | None:
        """One step back through a view, with the divisions that the axes' sizes decide carried out."""
        before = trace_view(here)
        if before is None:
            return None
        return IndexMap(before.node, self.simplified(before.indices))

    def simplified(self, indices: Indices) -> Indices:
        """The same formulas with the divisions that the axes' sizes decide carried out."""
        return tuple(without_divisions(index, self.sizes) for index in indices)

    def size(self, places: Iterable[int]) -> sympy.Basic:
        """The product of the sizes of some axes."""
        return sympy.expand(sympy.prod(self.sizes[digit(n)] for n in places))

    def wide(self, places: Iterable[int]) -> tuple[int, ...]:
        """Those of the axes whose size is not one."""
        return tuple(n for n in places if not is_one(self.shape[n]))

    def axes(self, shape: Sequence[Any], indices: Indices, time: int | None, dim: Any) -> Axes | None:
        """Read which axes of a tensor hold batch, time, head and dim; None when one of them mixes roles or is cut.

        indices: formulas of the tensor's indices.  time: the place that counts as time.  dim: the size of the whole of DIM.
        """
        roles = (self.wide(self.batch), self.wide(() if time is None else (time,)), self.wide(self.heads))
        places: tuple[int, ...]
        held: list[list[tuple[int, ...]]] = [[], [], [], []]
        axes: list[list[int]] = [[], [], [], []]
        divided: sympy.Basic = sympy.S.One
        for n, (size, index) in enumerate(zip(shape, indices, strict=True)):
            if is_one(size):
                continue
            if index == DIM:
                if sympy.expand(size_of(size) - size_of(dim)) != 0:
                    return None
                axes[3].append(n)
                continue
            if isinstance(index, FloorDiv) and len(self.heads) == 1 and index.args[0] == digit(self.heads[0]):
                divided, places = index.args[1], self.heads
                if sympy.expand(size_of(size) * divided - self.size(places)) != 0:
                    return None
            else:
                found = self.digits_of(index)
                if not found or sympy.expand(size_of(size) - self.size(found)) != 0:
                    return None
                places = found
            role = next((r for r, wanted in enumerate(roles) if set(places) <= set(wanted)), None)
            if role is None:
                return None
            held[role].append(places)
            axes[role].append(n)
        if len(axes[3]) != (0 if is_one(dim) else 1):
            return None
        ordered = []
        for role, wanted in enumerate(roles):
            pairs = sorted(zip(held[role], axes[role], strict=True))
            flat = [place for places, _ in pairs for place in places]
            if len(set(flat)) != len(flat) or [n for n in wanted if n in flat] != flat:
                return None
            if flat and tuple(flat) != wanted and (role != 2 or tuple(flat) != wanted[: len(flat)]):
                return None
            ordered.append(tuple(n for _, n in pairs))
            if role == 1 and tuple(flat) != wanted:
                return None
            if role == 2:
                missing = self.size(wanted[len(flat) :])
                repeats = sympy.expand(divided * missing)
        if not repeats.is_Integer:
            return None
        return Axes((ordered[0], ordered[1], ordered[2], tuple(axes[3])), int(repeats))

    def unpacked(
        self, shape: Sequence[Any], indices: Indices, dim: Any
    ) -> tuple[tuple[Any, ...], Indices, tuple[Packed, ...]]:
        """A shape and its indices with every axis that counts several roles together split into them.

        dim: the size of the whole of DIM.
        """
        sizes: list[Any] = []
        parts: list[sympy.Basic] = []
        packed: list[Packed] = []
        for n, (size, index) in enumerate(zip(shape, indices, strict=True)):
            found = self._mixed(index, dim)
            if sympy.expand(sympy.prod(size_of(held) for held, _ in found) - size_of(size)) != 0:
                found = []
            if found:
                packed.append((n, tuple(held for held, _ in found)))
            sizes.extend([held for held, _ in found] or [size])
            parts.extend([part for _, part in found] or [index])
        return tuple(sizes), tuple(parts), tuple(packed)

    def _mixed(self, index: sympy.Basic, dim: Any) -> list[tuple[Any, sympy.Basic]]:
        """Sizes and indices of the parts of an index that counts several roles together; [] for any other."""
        tail: list[tuple[Any, sympy.Basic]] = []
        if DIM in index.free_symbols and index != DIM:
            whole, rest = quotient_and_rest(index, size_of(dim), self.sizes | {DIM: size_of(dim)})
            if rest != DIM:
                return []
            index, tail = whole, [(dim, DIM)]
        found = self.digits_of(index) if index != DIM else None
        if not found or (not tail and any(set(found) <= set(places) for places in self.roles)):
            return []
        return [*((self.shape[n], digit(n)) for n in found), *tail]

    def views(self, shape: Sequence[Any], rank: int, place: Indices) -> tuple[View, ...] | None:
        """Steps that lay a tensor out as [B|1, H|1, Tq|1, Tk|1]; None when it cannot be.

        shape: the tensor's, aligned at the right with the scores where it meets them.  rank, place: the scores' number of
        axes there, and formulas of their indices.
        """
        offset = rank - len(shape)
        if self._is_canonical(place) and rank == 4:
            return ()
        steps: list[View] = []
        held: list[int] = []
        for n, size in enumerate(shape):
            here = len(held)
            if is_one(size):
                steps.append(View("squeeze", (here,)))
                continue
            found = self.digits_of(place[n + offset])
            if not found:
                return None
            if len(found) > 1:
                steps.append(View("unflatten", (here, tuple(self.shape[m] for m in found))))
            held.extend(found)
        order = [n for places in self.roles for n in places if n in held]
        if len(order) != len(held):
            return None
        if order != held:
            steps.append(View("permute", (tuple(held.index(n) for n in order),)))
        for n, places in enumerate(self.roles):
            wide = self.wide(places)
            present = [m for m in wide if m in held]
            if not present:
                steps.append(View("unsqueeze", (n,)))
                continue
            for m, axis in enumerate(wide):
                if axis not in held:
                    steps.append(View("unsqueeze", (n + m,)))
                    steps.append(View("expand", (n + m, self.shape[axis])))
            if len(wide) > 1:
                steps.append(View("flatten", (n, n + len(wide) - 1)))
        return tuple(steps)

    def _is_canonical(self, place: Indices) -> bool:
        expected = [n for places in self.roles for n in places]
        simple = all(len(places) == 1 for places in self.roles)
        return simple and all(
            index == (0 if is_one(self.shape[n]) else digit(n)) for index, n in zip(place, expected, strict=False)
        )


@lru_cache(maxsize=4096)
def _digits_of(index: sympy.Basic, sizes: Indices) -> tuple[int, ...] | None:
    rest = sympy.expand(without_divisions(index, {digit(n): size for n, size in enumerate(sizes)}))
    found: list[int] = []
    weight: sympy.Basic = sympy.S.One
    while rest != 0:
        place = next((n for n in range(len(sizes)) if rest.coeff(digit(n)) == weight), None)
        if place is None or place in found:
            return None
        found.insert(0, place)
        rest = sympy.expand(rest - weight * digit(place))
        weight = sympy.expand(weight * sizes[place])
    return tuple(found)


@dataclass(frozen=True)
class Axes:
    """Where a tensor holds batch, time, head and dim, and how many query heads share one of its heads."""

    axes: CanonicalAxes
    repeats: int
