"""Probabilities that are divided by their own sum once more become the softmax that this amounts to."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import dtype_of, rank_of, shape_of, users_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.canonicalize.emitting import emit

Node = torch.fx.Node
aten = torch.ops.aten
KEPT = frozenset(["cast", "contiguous"])
HIDING = frozenset(["mul", "masked_fill", "where"])


def renormalised_once(module: torch.fx.GraphModule) -> None:
    """Rewrite, in place, p / p.sum(axis) as p where p is a softmax over that axis, perhaps behind dropout that is off.

    Where a mask hides some of p first, the softmax becomes exponentials less their maximum, so that the quotient is the
    softmax over what is left.  A number that is added to the sum of all probabilities, or bounds it, and vanishes
    beside one is dropped; beside a masked sum it stays.  module: a functional graph with recorded values.
    """
    for node in list(module.graph.nodes):
        if kind(node) != "div" or arguments(node).get("rounding_mode") is not None:
            continue
        p, bottom = arguments(node)["a"], arguments(node)["b"]
        softmax, hidden = _softmax_behind(p)
        if softmax is None:
            continue
        total, plain = _total(bottom, dtype_of(softmax))
        if kind(total) != "sum" or arguments(total)["x"] is not p or not _over_same_axis(total, softmax):
            continue
        if not hidden:
            node.replace_all_uses_with(p)
            module.graph.erase_node(node)
        elif plain and _read_by_nothing_else(softmax, p, total, node):
            _written_out(softmax)


def _softmax_behind(p: Any) -> tuple[Node | None, bool]:
    """The softmax behind casts, dropout that is off, and masks, and whether there are masks."""
    hidden = False
    while isinstance(p, Node):
        name = kind(p)
        if name in ("softmax", "softmax_core") and p.target is not aten._safe_softmax.default:
            return p, hidden
        a = arguments(p) if name else {}
        if name in KEPT or (name == "dropout" and (not a["train"] or a["p"] == 0)):
            p = a["x"]
        elif name in HIDING:
            sides = [a["x"]] if "x" in a else [a["a"], a["b"]]
            same = [s for s in sides if isinstance(s, Node) and str(shape_of(s)) == str(shape_of(p))]
            p, hidden = next((s for s in same if _softmax_behind(s)[0] is not None), None), True
        else:
            return None, False
    return None, False


def _total(bottom: Any, dtype: torch.dtype | None) -> tuple[Any, bool]:
    """The sum that a denominator is, behind what does not change a sum of one, and whether there is nothing of the kind."""
    plain = True
    while kind(bottom) in ("add", "clamp", "maximum", "expand", "expand_as", *KEPT):
        a = arguments(bottom)
        if kind(bottom) == "add":
            small = isinstance(a["b"], int | float) and dtype is not None and 0 <= a["b"] <= torch.finfo(dtype).eps / 2
            if not small:
                return None, False
            plain = False
        elif kind(bottom) in ("clamp", "maximum"):
            least, most = (a["min"], a["max"]) if kind(bottom) == "clamp" else (a["b"], None)
            if most is not None or not isinstance(least, int | float) or least > 0.5:
                return None, False
            plain = False
        bottom = a.get("x", a.get("a"))
    return bottom, plain


def _over_same_axis(total: Node, softmax: Node) -> bool:
    a, rank = arguments(total), rank_of(softmax) or 1
    dims = a["dim"] if isinstance(a["dim"], list | tuple) else [a["dim"]]
    along = arguments(softmax)["dim"]
    numbers = len(dims) == 1 and isinstance(dims[0], int) and isinstance(along, int)
    return numbers and bool(a["keepdim"]) and dims[0] % rank == along % rank


def _read_by_nothing_else(softmax: Node, p: Node, total: Node, quotient: Node) -> bool:
    """True where probabilities, masked ones and their sum lead to the quotient alone, in which a factor of a row cancels."""
    frontier, seen = [softmax], {softmax}
    for here in frontier:
        for user in users_of(here):
            if user is quotient or user in seen:
                continue
            if not (user is total or kind(user) in KEPT | HIDING | {"dropout", "expand", "expand_as"}):
                return False
            seen.add(user)
            frontier.append(user)
    return {p, total} <= seen


def _written_out(softmax: Node) -> None:
    """exp(x - max(x)) in the place of a softmax, in its dtype."""
    a = arguments(softmax)
    x, dtype = a["x"], dtype_of(softmax)
    if dtype_of(x) != dtype:
        x = emit(softmax, aten.to.dtype, x, dtype)
    top = emit(softmax, aten.amax.default, x, [a["dim"]], True)
    made = emit(softmax, aten.exp.default, emit(softmax, aten.sub.Tensor, x, top))
    softmax.replace_all_uses_with(made)
    softmax.graph.erase_node(softmax)
