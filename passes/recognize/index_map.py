"""Follow an element of a tensor back through views: which element of which earlier tensor is it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import shape_of, value_of
from subquad.ir.mask import FloorDiv
from subquad.ir.vocabulary import arguments, kind
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
    if name in ("contiguous", "unsqueeze", "squeeze", "expand", "view", "flatten", "unflatten", "transpose", "t", "permute",
                "slice", "select", "narrow", "getitem", "repeat_interleave"):  # fmt: skip
        a = arguments(node)
        base = a["x"]
        shape = shape_of(base)
        if shape is None:
            return None
        moved = _STEPS[name](a, indices, shape, shape_of(node) or ())
        return None if moved is None else IndexMap(base, moved)
    return None


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
    """Split both shapes into groups of equal size, then divide each group's flat index.

    Axes of size one are cheap to place, so groups are matched on the sizes that are not one.
    """
    result: list[sympy.Basic] = [sympy.S.Zero] * len(base)
    left = [n for n, s in enumerate(base) if not is_one(s)]
    right = [n for n, s in enumerate(out) if not is_one(s)]
    while left or right:
        if not left or not right:
            return None
        group_l, group_r = [left.pop(0)], [right.pop(0)]
        size_l, size_r = size_of(base[group_l[0]]), size_of(out[group_r[0]])
        while sympy.expand(size_l - size_r) != 0:
            if _divides(size_l, size_r) and left:
                group_l.append(left.pop(0))
                size_l = size_l * size_of(base[group_l[-1]])
            elif _divides(size_r, size_l) and right:
                group_r.append(right.pop(0))
                size_r = size_r * size_of(out[group_r[-1]])
            else:
                return None
        if len(group_l) == len(group_r) == 1:
            result[group_l[0]] = i[group_r[0]]
            continue
        flat: sympy.Basic = sympy.S.Zero
        for n in group_r:
            flat = flat * size_of(out[n]) + i[n]
        _divide(flat, group_l, base, [(i[n], size_of(out[n])) for n in group_r], result)
    return tuple(result)


def _divides(small: sympy.Basic, large: sympy.Basic) -> bool:
    quotient = sympy.simplify(large / small)
    return bool(quotient.is_integer) and quotient != 1 if quotient.is_number else not (small / large).is_integer


def _divide(
    flat: sympy.Basic,
    group: list[int],
    base: Shape,
    parts: list[tuple[sympy.Basic, sympy.Basic]],
    result: list[sympy.Basic],
) -> None:
    """Write flat index → indices of `group`, using the ranges of the parts to drop divisions that do nothing."""
    trailing: sympy.Basic = sympy.S.One
    for n in reversed(group):
        size = size_of(base[n])
        high = _floordiv_parts(parts, trailing)
        result[n] = _mod_parts(high, size) if n != group[0] else _flat(high)
        trailing = trailing * size


def _flat(parts: list[tuple[sympy.Basic, sympy.Basic]]) -> sympy.Basic:
    total: sympy.Basic = sympy.S.Zero
    for index, size in parts:
        total = total * size + index
    return total


def _floordiv_parts(
    parts: list[tuple[sympy.Basic, sympy.Basic]], divisor: sympy.Basic
) -> list[tuple[sympy.Basic, sympy.Basic]]:
    """Mixed-radix number divided by `divisor`: whole low digits are dropped, a partly divided digit is split."""
    rest = list(parts)
    left = divisor
    while rest and left != 1:
        index, size = rest.pop()
        ratio = sympy.simplify(left / size)
        if ratio.is_integer:
            left = ratio
            continue
        rest.append((FloorDiv(index, left), sympy.simplify(size / left)))
        left = sympy.S.One
    return rest


def _mod_parts(parts: list[tuple[sympy.Basic, sympy.Basic]], modulus: sympy.Basic) -> sympy.Basic:
    kept: list[tuple[sympy.Basic, sympy.Basic]] = []
    covered: sympy.Basic = sympy.S.One
    for index, size in reversed(parts):
        if sympy.simplify(covered - modulus) == 0:
            break
        wider = covered * size
        if sympy.simplify(modulus / wider).is_integer:
            kept.append((index, size))
            covered = wider
            continue
        kept.append((sympy.Mod(index, sympy.simplify(modulus / covered)), size))
        covered = modulus
    return _flat(list(reversed(kept)))


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
            at_index = _start(item, base[dim])
            if at_index is None:
                return None
            result.append(at_index)
        dim += 1
    return tuple(result)


def _repeat_interleave(a: dict[str, Any], i: Indices, base: Shape, out: Shape) -> Indices | None:
    if a["dim"] is None or isinstance(a["repeats"], Node):
        return None
    dim = a["dim"] % len(base)
    return (*i[:dim], FloorDiv(i[dim], _integer(a["repeats"])), *i[dim + 1 :])


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
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "narrow": _narrow,
    "getitem": _getitem,
    "repeat_interleave": _repeat_interleave,
}
