"""Follow an element of a tensor back through views: which element of which earlier tensor is it?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of, shape_of, value_of
from subquad.ir.mask import FloorDiv
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.mixed_radix import quotient_and_rest
from subquad.passes.recognize.symbolic_tensor import is_one, size_of

Node = torch.fx.Node


@dataclass(frozen=True)
class IndexMap:
    """The element of `node` at `indices` (formulas of the indices the walk began with)."""

    node: Node
    indices: tuple[sympy.Basic, ...]


def trace_view(start: IndexMap) -> IndexMap | None:
    """One step back through a view; None when the node is no view or the step cannot be expressed."""
    node, indices = start.node, start.indices
    name = kind(node)
    if name in ("stack", "cat"):
        return _copies(node, indices)
    if name in _STEPS:
        a = arguments(node)
        base = a["x"]
        if name == "getitem" and kind(base) == "unbind":
            a = {"dim": arguments(base)["dim"], "index": a["index"]}
            name, base = "select", arguments(base)["x"]
        shape = shape_of(base)
        if shape is None or dtype_of(base) != dtype_of(node):  # the same bits read as another dtype
            return None
        moved = _STEPS[name](a, indices, shape, shape_of(node) or ())
        return None if moved is None else IndexMap(base, moved)
    return None


def _copies(node: Node, indices: Indices) -> IndexMap | None:
    """A stack or concatenation of one tensor several times is a repetition of it."""
    a = arguments(node)
    parts, shape = list(a["tensors"]), shape_of(node) or ()
    if not all(_is_same(part, parts[0]) for part in parts):
        return None
    along = a["dim"] % len(shape)
    if kind(node) == "stack":
        return IndexMap(parts[0], indices[:along] + indices[along + 1 :])
    inner = sympy.Mod(indices[along], size_of((shape_of(parts[0]) or ())[along]))
    return IndexMap(parts[0], (*indices[:along], inner, *indices[along + 1 :]))


def _is_same(a: Any, b: Any) -> bool:
    """True for one node, or for the same view written twice."""
    return a is b or (
        isinstance(a, Node)
        and isinstance(b, Node)
        and kind(a) in ("unsqueeze", "contiguous")
        and (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs)
    )


def viewed(view: Node, base: Node, indices: Indices) -> Indices | None:
    """One step forward: formulas of the indices of `view`, all of `base` in another layout, from those of `base`.

    None when the node is no such view or repeats, drops or cannot place an element.
    """
    here, there = shape_of(view) or (), shape_of(base) or ()
    name = kind(view)
    if name in ("view", "flatten", "unflatten"):
        return _view({}, indices, here, there)
    marks = tuple(sympy.S.Zero if is_one(size) else sympy.Dummy(f"x{n}") for n, size in enumerate(here))
    traced = trace_view(IndexMap(view, marks))
    if traced is None or traced.node is not base:
        return None
    known = {mark: index for mark, index in zip(traced.indices, indices, strict=True) if mark.is_Symbol}
    wide = [mark for mark in marks if mark != 0]
    kept = [n for n, size in enumerate(there) if not is_one(size)]
    if len(kept) != len(wide) or any(mark not in known for mark in wide) or len(known) != len(wide):
        return None
    return tuple(known.get(mark, sympy.S.Zero) for mark in marks)


Indices = tuple[sympy.Basic, ...]
Shape = tuple[Any, ...]


def _integer(value: Any) -> sympy.Basic:
    return size_of(value_of(value)) if isinstance(value, Node) else size_of(value)


def _unsqueeze(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    dim = a["dim"] % len(out)
    return i[:dim] + i[dim + 1 :]


def _squeeze(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    dims = a["dim"]
    wanted = (
        range(len(base))
        if dims is None
        else [d % len(base) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    )
    rest = list(i)
    return tuple(sympy.S.Zero if n in wanted and is_one(size) else rest.pop(0) for n, size in enumerate(base))


def _expand(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    offset = len(out) - len(base)
    return tuple(
        sympy.S.Zero if is_one(size) and not is_one(out[n + offset]) else i[n + offset] for n, size in enumerate(base)
    )


def _view(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    """Both shapes hold the same elements in the same order: equal groups of axes share one flat index."""
    formulas = _regrouped(tuple(map(size_of, base)), tuple(map(size_of, out)))
    back = {_mark(n): index for n, index in enumerate(i)}
    return tuple(formula.xreplace(back) for formula in formulas)


def _mark(place: int) -> sympy.Symbol:
    return sympy.Symbol(f"x{place}", integer=True, nonnegative=True)


@lru_cache(maxsize=1024)
def _regrouped(base: Indices, out: Indices) -> Indices:
    """Formulas of the indices of a tensor of sizes `base` from those, named by _mark, of a view of sizes `out`."""
    result: list[sympy.Basic] = [sympy.S.Zero] * len(base)
    for left, right in _groups(base, out):
        if not left:
            continue
        sizes = {_mark(n): out[n] for n in right}
        rest: sympy.Basic = sympy.S.Zero
        for n in right:
            rest = rest * out[n] + _mark(n)
        for n in reversed(left[1:]):
            rest, result[n] = quotient_and_rest(rest, base[n], sizes)
        result[left[0]] = rest
    return tuple(result)


def _groups(base: Indices, out: Indices) -> list[tuple[list[int], list[int]]]:
    """Axes of two layouts of the same elements, split into groups of equal product.

    Axes of size one hold no index and are left out.  What cannot be split, because sizes cannot be compared, is one group
    between the equal axes at both ends.
    """
    left = [n for n, size in enumerate(base) if size != 1]
    right = [n for n, size in enumerate(out) if size != 1]
    first: list[tuple[list[int], list[int]]] = []
    last: list[tuple[list[int], list[int]]] = []
    while left and right and _equal(base[left[0]], out[right[0]]):
        first.append(([left.pop(0)], [right.pop(0)]))
    while left and right and _equal(base[left[-1]], out[right[-1]]):
        last.insert(0, ([left.pop()], [right.pop()]))
    return [*first, *_middle(left, right, base, out), *last]


def _middle(left: list[int], right: list[int], base: Indices, out: Indices) -> list[tuple[list[int], list[int]]]:
    """The shortest leading axes with equal products form a group, and so on."""
    groups: list[tuple[list[int], list[int]]] = []
    begun, taken = 0, 0
    while begun < len(left) and taken < len(right):
        pairs = [(n, m) for n in range(begun + 1, len(left) + 1) for m in range(taken + 1, len(right) + 1)]
        ends = next(
            (
                (n, m)
                for n, m in sorted(pairs, key=sum)
                if _product(base, left[begun:n]) == _product(out, right[taken:m])
            ),
            (len(left), len(right)),
        )
        groups.append((left[begun : ends[0]], right[taken : ends[1]]))
        begun, taken = ends
    if begun < len(left) or taken < len(right):
        return [(left, right)]
    return groups


def _equal(a: sympy.Basic, b: sympy.Basic) -> bool:
    return a == b or bool(sympy.expand(a - b) == 0)


def _product(shape: Indices, places: list[int]) -> sympy.Basic:
    return sympy.expand(sympy.prod(shape[n] for n in places))


def _flatten(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    return _view(a, i, base, out)


def _transpose(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    order = list(i)
    first, second = a["dim0"] % len(order), a["dim1"] % len(order)
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _t(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    return (*i[:-2], i[-1], i[-2]) if len(i) >= 2 else i


def _permute(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    result: list[sympy.Basic] = [sympy.S.Zero] * len(i)
    for place, dim in enumerate(a["dims"]):
        result[dim % len(i)] = i[place]
    return tuple(result)


def _start(value: Any, size: Any) -> sympy.Basic | None:
    if value is None:
        return sympy.S.Zero
    start = _integer(value)
    if start.is_Integer and start < 0:
        return size_of(size) + start
    return start


def _slice(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    dim = a["dim"] % len(base)
    start, step = _start(a["start"], base[dim]), a["step"]
    if start is None:
        return None
    return (*i[:dim], start + _integer(step) * i[dim], *i[dim + 1 :])


def _select(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    dim = a["dim"] % len(base)
    at = _start(a["index"], base[dim])
    return None if at is None else (*i[:dim], at, *i[dim:])


def _narrow(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    if isinstance(a["start"], Node) and shape_of(a["start"]) is not None:
        return None
    return _slice({"dim": a["dim"], "start": a["start"], "step": 1}, i, base, out)


def _getitem(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    items = list(a["index"]) if isinstance(a["index"], (list, tuple)) else [a["index"]]
    if any(isinstance(x, Node) and shape_of(x) is not None for x in items):
        return None
    lists = [x for x in items if isinstance(x, list)]
    if lists and (len(lists) > 1 or len(lists[0]) != 1 or any(isinstance(x, int) for x in items)):
        return None
    named = sum(1 for x in items if x is not None and x is not Ellipsis)
    fill = [slice(None)] * (len(base) - named)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = fill
    else:
        items += fill
    rest, result, dim = list(i), [], 0
    for item in items:
        if item is None:
            rest.pop(0)
            continue
        if isinstance(item, slice):
            start = _start(item.start, base[dim])
            if start is None:
                return None
            result.append(start + _integer(item.step or 1) * rest.pop(0))
        else:
            if isinstance(item, list):
                rest.pop(0)
                item = item[0]
            at_index = _start(item, base[dim])
            if at_index is None:
                return None
            result.append(at_index)
        dim += 1
    return tuple(result)


def _repeat_interleave(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    repeats = a["repeats"]
    if (a["dim"] is None and len(base) != 1) or (isinstance(repeats, Node) and shape_of(repeats) is not None):
        return None
    dim = (a["dim"] or 0) % len(base)
    return (*i[:dim], FloorDiv(i[dim], _integer(repeats)), *i[dim + 1 :])


def _movedim(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    source, destination = (
        [d % len(i) for d in (dims if isinstance(dims, list | tuple) else [dims])]
        for dims in (a["source"], a["destination"])
    )
    rest = iter(n for n in range(len(i)) if n not in source)
    from_place = dict(zip(destination, source, strict=True))
    order = [from_place[n] if n in from_place else next(rest) for n in range(len(i))]
    return _permute({"dims": order}, i, base, out)


def _repeat(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    offset = len(out) - len(base)
    kept = []
    for n, size in enumerate(base):
        before, after = size_of(size), size_of(out[n + offset])
        same = sympy.expand(before - after) == 0
        kept.append(i[n + offset] if same else sympy.S.Zero if is_one(size) else sympy.Mod(i[n + offset], before))
    return tuple(kept)


_STEPS = {
    "contiguous": lambda a, i, base, out: i,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "view": _view,
    "flatten": _flatten,
    "unflatten": _flatten,
    "transpose": _transpose,
    "t": _t,
    "reversed": lambda a, i, base, out: i[::-1],
    "permute": _permute,
    "movedim": _movedim,
    "repeat": _repeat,
    "slice": _slice,
    "select": _select,
    "narrow": _narrow,
    "getitem": _getitem,
    "repeat_interleave": _repeat_interleave,
}
