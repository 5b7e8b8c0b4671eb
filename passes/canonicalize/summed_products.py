"""Scores and weighted values that are spelled as a product of elements and a sum become one product of tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import dtype_of, rank_of, shape_of, users_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.canonicalize.emitting import emit
from subquad.passes.recognize.normalisation import leads_to_exp
from subquad.passes.recognize.score_path import STEPS, VIEWS, is_weight
from subquad.passes.recognize.symbolic_tensor import is_one

Node = torch.fx.Node
aten = torch.ops.aten
LETTERS = "abcdefghijklmnop"
SOFTMAX = frozenset(["softmax", "softmax_core"])
ENDS = SOFTMAX | {"log_softmax", "logsumexp", "exp", "exp2"}
BETWEEN = VIEWS | {"cast", "dropout"}
FURTHEST = 24


def products_joined(module: torch.fx.GraphModule) -> None:
    """Replace, in place, (a · b).sum(axis) by an einsum where it gives scores of a softmax or values weighted by one.

    So are cosine_similarity, with both sides divided by their norms, and inner.  An operand of size one along an axis of
    the other is broadcast and loses the axis.  module: a functional graph with recorded values.
    """
    for node in list(module.graph.nodes):
        if kind(node) == "einsum":
            _without_spread(node)
        elif kind(node) == "inner":
            _inner_written_out(node)
        read = _summed(node)
        if read is None:
            continue
        a, b, dim, keepdim = read
        attends = _are_scores(node) or any(_is_probability(side) for side in (a, b))
        stands = _product(node, a, b, dim, keepdim) if attends else None
        if stands is not None:
            node.replace_all_uses_with(stands)
            module.graph.erase_node(node)


def _summed(node: Node) -> tuple[Node, Node, int, bool] | None:
    """The two tensors whose elements are multiplied, the axis summed over, and whether it is kept; None for anything else."""
    name = kind(node)
    if name == "sum":
        a = arguments(node)
        dims = a["dim"] if isinstance(a["dim"], list | tuple) else [a["dim"]]
        product = a["x"]
        if kind(product) != "mul" or len(dims) != 1 or dims[0] is None or users_of(product) != [node]:
            return None
        sides, keepdim = arguments(product), bool(a["keepdim"])
        pair, rank = (sides["a"], sides["b"]), rank_of(product) or 0
    elif name == "cosine_similarity":
        sides = arguments(node)
        pair, keepdim, dims = (sides["a"], sides["b"]), False, [sides["dim"]]
        rank = max(rank_of(side) or 0 for side in pair)
    else:
        return None
    alike = all(isinstance(side, Node) and shape_of(side) is not None for side in pair)
    if not alike or not rank or any(dtype_of(side) != dtype_of(node) or is_weight(side) for side in pair):
        return None
    return *pair, int(dims[0]) % rank - rank, keepdim


def _product(node: Node, a: Node, b: Node, dim: int, keepdim: bool) -> Node | None:
    """The einsum of two broadcast tensors over one axis, counted from the last; None where one is broadcast along it."""
    if kind(node) == "cosine_similarity":
        a, b = (_normed(node, side, dim, arguments(node)["eps"]) for side in (a, b))
    rank = max(rank_of(a) or 0, rank_of(b) or 0)
    if rank > len(LETTERS):
        return None
    letters = LETTERS[:rank]
    lean = [_lean(node, x, other, letters) for x, other in ((a, b), (b, a))]
    over = letters[dim]
    if any(over not in labels for _, labels in lean):
        return None
    out = "".join(c for c in letters if c != over and any(c in labels for _, labels in lean))
    equation = f"{lean[0][1]},{lean[1][1]}->{out}"
    made = emit(node, aten.einsum.default, equation, [lean[0][0], lean[1][0]])
    return emit(node, aten.unsqueeze.default, made, dim) if keepdim else made


def _lean(node: Node, x: Node, other: Node, letters: str) -> tuple[Node, str]:
    """A tensor without the axes along which it is only broadcast, and the labels of those left."""
    while kind(x) in ("expand", "expand_as") and str(shape_of(x)) == str(shape_of(other)):
        x = arguments(x)["x"]
    shape, wide = shape_of(x) or (), shape_of(other) or ()
    labels = letters[len(letters) - len(shape) :]
    spread = [
        n
        for n, size in enumerate(shape)
        if is_one(size) and len(shape) - n <= len(wide) and not is_one(wide[n - len(shape)])
    ]
    for n in reversed(spread):
        x = emit(node, aten.squeeze.dim, x, n)
    return x, "".join(c for n, c in enumerate(labels) if n not in spread)


def _inner_written_out(node: Node) -> None:
    """The einsum over the last axes of two tensors of activations."""
    a, b = arguments(node)["a"], arguments(node)["b"]
    left, right = (rank_of(a) or 0) - 1, (rank_of(b) or 0) - 1
    if min(left, right) < 1 or left + right >= len(LETTERS) or is_weight(a) or is_weight(b):
        return
    over, out = LETTERS[-1], LETTERS[: left + right]
    stands = emit(node, aten.einsum.default, f"{out[:left]}{over},{out[left:]}{over}->{out}", [a, b])
    node.replace_all_uses_with(stands)
    node.graph.erase_node(node)


def _without_spread(node: Node) -> None:
    """Take probabilities that an einsum gets expanded to the shape of the values as they were before."""
    terms, arrow, out = str(arguments(node)["equation"]).replace(" ", "").partition("->")
    labels, operands = terms.split(","), list(arguments(node)["operands"])
    if not arrow or "." in terms or len(operands) != 2:
        return
    for n, (x, other) in enumerate((operands, operands[::-1])):
        before = arguments(x)["x"] if kind(x) in ("expand", "expand_as") else None
        spread = isinstance(before, Node) and _is_probability(before) and rank_of(before) == rank_of(x)
        if not isinstance(before, Node) or not spread or labels[n] != labels[1 - n]:
            continue
        operands[n], labels[n] = _lean(node, before, other, labels[n])
        stands = emit(node, aten.einsum.default, f"{','.join(labels)}->{out}", operands)
        node.replace_all_uses_with(stands)
        node.graph.erase_node(node)
        return


def _normed(node: Node, x: Node, dim: int, eps: float) -> Node:
    norm = emit(node, aten.linalg_vector_norm.default, x, 2, [dim], True)
    return emit(node, aten.div.Tensor, x, emit(node, aten.clamp_min.default, norm, eps))


def _are_scores(node: Node) -> bool:
    """True for what leads to a softmax, called or written out, through operations on scores alone."""
    frontier, seen = [node], {node}
    for here in frontier:
        for user in users_of(here):
            if kind(user) in ENDS:
                return True
            if kind(user) in STEPS and user not in seen and len(seen) < FURTHEST:
                seen.add(user)
                frontier.append(user)
    return False


def _is_probability(x: Any) -> bool:
    while kind(x) in BETWEEN:
        x = arguments(x)["x"]
    return kind(x) in SOFTMAX or leads_to_exp(arguments(x)["a"] if kind(x) == "div" else x)
