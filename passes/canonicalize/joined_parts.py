"""Parts of one tensor that are changed one by one and joined again become one change of the whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import dtype_of, rank_of, shape_of, value_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.canonicalize.emitting import emit
from subquad.passes.canonicalize.partial_sums import ranges_of, uncut

Node = torch.fx.Node
aten = torch.ops.aten
OPERATORS = {"add": aten.add.Tensor, "mul": aten.mul.Tensor}
SPLITS = frozenset(["split", "split_with_sizes", "chunk"])


def parts_changed_whole(module: torch.fx.GraphModule) -> None:
    """Replace, in place, cat([x₁ ∘ b₁, x₂ ∘ b₂, …]) by x ∘ cat([b₁, b₂, …]) where the xᵢ are all of x, in order.

    ∘ is a sum, a difference or a product with tensors, as groups of heads get biases of their own.  module: a functional graph
    with recorded values; the axis that is split has a fixed size.
    """
    for node in list(module.graph.nodes):
        if kind(node) == "cat":
            stands = _whole(node)
            if stands is not None:
                node.replace_all_uses_with(stands)
                module.graph.erase_node(node)


def _whole(node: Node) -> Node | None:
    """What a `cat` amounts to as one operation; None where it stays."""
    parts, rank = list(arguments(node)["tensors"]), rank_of(node) or 1
    dim = int(arguments(node)["dim"] or 0) % rank
    names = {"add" if kind(part) == "sub" else kind(part) for part in parts}
    name = names.pop() if len(names) == 1 and len(parts) > 1 else None
    if name not in OPERATORS or any(len(part.users) != 1 for part in parts):
        return None
    read = [arguments(part) for part in parts]
    if any(a.get("alpha", 1) != 1 for a in read):
        return None
    x = _source([a["a"] for a in read], dim)
    others = [a["b"] for a in read]
    if x is None or dtype_of(x) != dtype_of(node) or any(dtype_of(other) != dtype_of(node) for other in others):
        return None
    spread = []
    for other, part in zip(others, parts, strict=True):
        wide = _spread(node, other, part, dim)
        if wide is None:
            return None
        spread.append(emit(node, aten.neg.default, wide) if kind(part) == "sub" else wide)
    if len({str([size for n, size in enumerate(shape_of(wide) or ()) if n != dim]) for wide in spread}) != 1:
        return None
    joined = emit(node, aten.cat.default, spread, dim)
    return emit(node, OPERATORS[name], x, joined)


def _source(parts: list[Any], dim: int) -> Node | None:
    """The tensor of which these are all parts along an axis, in order; None where they are anything else."""
    source, place = None, 0
    for part in parts:
        found = _part(part, dim)
        wide = (shape_of(part) or ())[dim : dim + 1]
        if found is None or source not in (None, found[0]) or found[1] != place or not isinstance(wide[0], int):
            return None
        source, place = found[0], place + wide[0]
    return source if source is not None and (shape_of(source) or ())[dim] == place else None


def _part(part: Any, dim: int) -> tuple[Node, int] | None:
    """The tensor that a node is a range of along one axis, and where the range begins."""
    ranges = ranges_of(part)
    if ranges is not None:
        return (uncut(arguments(part)["x"]), ranges[dim][0]) if set(ranges) == {dim} else None
    if kind(part) != "getitem" or kind(arguments(part)["x"]) not in SPLITS:
        return None
    split, number = arguments(part)["x"], arguments(part)["index"]
    a = arguments(split)
    source, along = a["x"], int(a["dim"] or 0) % (rank_of(a["x"]) or 1)
    sizes = [piece.shape[dim] for piece in value_of(split) or ()] if along == dim else []
    if along != dim or not isinstance(number, int) or not all(isinstance(size, int) for size in sizes):
        return None
    return source, sum(sizes[:number])


def _spread(node: Node, other: Any, part: Node, dim: int) -> Node | None:
    """The second operand with all axes of its part, as wide on the one that is joined; None for a number."""
    if not isinstance(other, Node) or shape_of(other) is None:
        return None
    for _ in range((rank_of(node) or 0) - (rank_of(other) or 0)):
        other = emit(node, aten.unsqueeze.default, other, 0)
    held = shape_of(other) or ()
    wide = (shape_of(part) or ())[dim]
    if held[dim] == wide:
        return other
    return emit(node, aten.expand.default, other, [wide if n == dim else -1 for n in range(len(held))])
