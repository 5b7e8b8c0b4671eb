"""What changes whole rows of probabilities, by a factor or a zero, is done to the weighted values instead."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import dtype_of, rank_of, shape_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.canonicalize.emitting import emit
from subquad.passes.recognize.guards import is_zero
from subquad.passes.recognize.product import PRODUCTS, read_product

Node = torch.fx.Node
aten = torch.ops.aten
KEPT = frozenset(["dropout", "cast", "contiguous"])
JOINING = frozenset(["view", "expand", "flatten", "unflatten"])
CHANGES = frozenset(["mul", "masked_fill", "where"])
FURTHEST = 64


def rows_changed_last(module: torch.fx.GraphModule) -> None:
    """Rewrite, in place, (p · g) @ v as (p @ v) · g, where g has one value for all keys, and a fill of p by zero likewise.

    p is a softmax over the keys.  Rows that a text without media before it, or a gate of a head, zeroes or scales are of
    this form.  A condition that is computed from the scores themselves stays: it guards rows without keys.
    module: a functional graph with recorded values.
    """
    for node in reversed(list(module.graph.nodes)):
        if kind(node) in CHANGES:
            _move(module.graph, node)


def _move(graph: torch.fx.Graph, node: Node) -> None:
    read = _change(node)
    if read is None:
        return
    p, rows = read
    softmax, weighted = _softmax_behind(p), _weighted(node)
    if softmax is None or weighted is None or _computed_from(rows, softmax):
        return
    node.replace_all_uses_with(p)
    with graph.inserting_before(weighted):
        made = graph.node_copy(weighted)
    if kind(node) == "mul":
        stands = emit(weighted, aten.mul.Tensor, made, rows)
    elif kind(node) == "masked_fill":
        stands = emit(weighted, aten.masked_fill.Scalar, made, rows, 0)
    else:
        zero = emit(weighted, aten.zeros_like.default, made)
        first = arguments(node)["a"] is p
        stands = emit(weighted, aten.where.self, rows, *((made, zero) if first else (zero, made)))
    weighted.replace_all_uses_with(stands)
    graph.erase_node(weighted)
    graph.erase_node(node)


def _change(node: Node) -> tuple[Node, Node] | None:
    """The probabilities that a node changes and the tensor over rows that says how; None for any other operation."""
    a = arguments(node)
    if kind(node) == "mul":
        pairs = [(a["a"], a["b"]), (a["b"], a["a"])]
        return next((pair for pair in pairs if _over_rows(pair[1], pair[0])), None)
    if kind(node) == "masked_fill":
        return (a["x"], a["mask"]) if is_zero(a["value"]) and _over_rows(a["mask"], a["x"]) else None
    for kept, other in ((a["a"], a["b"]), (a["b"], a["a"])):
        if is_zero(other) and _over_rows(a["cond"], kept):
            return kept, a["cond"]
    return None


def _over_rows(rows: Any, p: Any) -> bool:
    """True for a tensor with the axes of the probabilities and one value for all keys."""
    return (
        isinstance(rows, Node) and isinstance(p, Node) and rank_of(rows) is not None and rank_of(rows) == rank_of(p)
        and (shape_of(rows) or (0,))[-1] == 1 and (shape_of(p) or (1,))[-1] != 1
        and (dtype_of(rows) == dtype_of(p) or not (dtype_of(rows) or torch.float64).is_floating_point)
    )  # fmt: skip


def _softmax_behind(p: Any) -> Node | None:
    """The softmax over the last axis whose probabilities these are, perhaps with rows changed before."""
    while kind(p) in KEPT | CHANGES:
        before = _change(p) if kind(p) in CHANGES else (arguments(p)["x"],)
        if before is None:
            return None
        p = before[0]
    if kind(p) not in ("softmax", "softmax_core"):
        return None
    dim = arguments(p)["dim"]
    return p if isinstance(dim, int) and dim % (rank_of(p) or 1) == (rank_of(p) or 1) - 1 else None


def _weighted(node: Node) -> Node | None:
    """The weighted values, by a product that alone reads changed probabilities, with their axes and features for keys.

    Batch and heads may be joined by views around the product, as decomposition makes them.
    """
    here, shape = node, list(map(str, shape_of(node) or ()))
    while len(here.users) == 1:
        user = next(iter(here.users))
        product = read_product(user) if kind(user) in PRODUCTS else None
        if product is not None and product.right is here:
            product = product.swapped()
        if product is not None and product.left is here:
            plain = product.addend is None and product.alpha == 1 and product.contracted == product.left_labels[-1]
            like = dtype_of(user) == dtype_of(node) and product.out_labels[:-1] == product.left_labels[:-1]
            return _parted(user, shape) if plain and like else None
        if kind(user) not in KEPT | JOINING or list(map(str, shape_of(user) or ()))[-2:] != shape[-2:]:
            return None
        here = user
    return None


def _parted(node: Node, shape: list[str]) -> Node | None:
    """The node itself, or the view of it that has batch and heads on axes of their own again."""
    while list(map(str, shape_of(node) or ()))[:-1] != shape[:-1]:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or kind(user) not in JOINING or (shape_of(user) or (0,))[-1] != (shape_of(node) or (1,))[-1]:
            return None
        node = user
    return node


def _computed_from(rows: Node, softmax: Node) -> bool:
    """True where the scores, or the probabilities themselves, decide what happens to rows."""
    scores = {softmax, arguments(softmax)["x"]}
    frontier, seen = [rows], {rows}
    for here in frontier:
        if here in scores:
            return True
        if len(seen) < FURTHEST:
            new = [n for n in here.all_input_nodes if n not in seen]
            seen.update(new)
            frontier.extend(new)
    return False
