"""Rules of the mask algebra that move indices: views, slices, gathers and concatenations."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.vocabulary import kind
from subquad.passes.recognize.index_map import IndexMap, trace_view
from subquad.passes.recognize.mask_algebra import RULES, MaskAlgebra
from subquad.passes.recognize.symbolic_tensor import axis, is_one

Node = torch.fx.Node
VIEWS = ("unsqueeze", "squeeze", "expand", "view", "flatten", "transpose", "t", "permute", "slice", "select", "narrow")


def _view(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    start = IndexMap(node, tuple(sympy.S.Zero if is_one(size) else axis(n) for n, size in enumerate(shape)))
    moved = trace_view(start)
    return None if moved is None else algebra._known[moved.node].at(moved.indices)


def _gather(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    if kind(node) == "getitem" and not _has_tensor(a["index"]):
        return _view(algebra, node, a, shape)
    indices = a["indices"] if kind(node) == "index" else a["index"]
    indices = list(indices) if isinstance(indices, (list, tuple)) else [indices]
    places = [n for n, index in enumerate(indices) if isinstance(index, Node)]
    if not places or places != list(range(places[0], places[-1] + 1)):
        return None
    if any(not (index is None or isinstance(index, Node) or index == slice(None)) for index in indices):
        return None
    tensors = [indices[n] for n in places]
    if any(algebra._known[t].expression.is_number is False and shape_of(t) is None for t in tensors):
        return None
    gathered = torch.broadcast_shapes(*[tuple(2 if not is_one(s) else 1 for s in shape_of(t) or ()) for t in tensors])
    first, width = places[0], len(gathered)
    inner = shape[first : first + width]
    picked = []
    for tensor in tensors:
        expression = algebra._known[tensor].broadcast(inner)
        shifted = (
            expression.xreplace({axis(n): axis(n + first) for n in reversed(range(width))}) if first else expression
        )
        if not shifted.is_nonnegative:
            return None
        picked.append(shifted)
    base = algebra._known[a["x"]]
    rest = base.rank - first - len(places)
    before = tuple(axis(n) for n in range(first))
    after = tuple(axis(first + width + n) for n in range(rest))
    return base.at(before + tuple(picked) + after)


def _has_tensor(index: Any) -> bool:
    items = index if isinstance(index, (list, tuple)) else [index]
    return any(isinstance(item, Node) and shape_of(item) is not None for item in items)


def _concatenation(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    """A concatenation whose parts continue one formula is that formula; others have no rule."""
    parts = [algebra._known[part] for part in a["tensors"]]
    along = a["dim"] % len(shape)
    start: sympy.Basic = sympy.S.Zero
    whole = parts[0].expression
    for part in parts:
        moved = whole.xreplace({axis(along): axis(along) + start}) if start != 0 else whole
        mine = part.expression
        if is_one(part.shape[along]):
            moved = moved.xreplace({axis(along): sympy.S.Zero})
        if sympy.expand(moved - mine) != 0:
            return None
        start = start + algebra.size(part.shape[along])
    return whole


for _name in VIEWS:
    RULES[_name] = _view
RULES["index"] = _gather
RULES["getitem"] = _gather
RULES["cat"] = _concatenation
