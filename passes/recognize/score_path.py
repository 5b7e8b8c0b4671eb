"""The way from a softmax up to the product of queries and keys that feeds it, and what is there when there is none."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import rank_of, shape_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.product import PRODUCTS, factors, read_product
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.symbolic_tensor import is_one

Node = torch.fx.Node
VIEWS = frozenset(
    ["view", "flatten", "unflatten", "transpose", "t", "reversed", "permute", "movedim", "unsqueeze", "squeeze", "expand",
     "repeat", "contiguous"]
)  # fmt: skip
STEPS = VIEWS | {
    "mul", "div", "add", "sub", "tanh", "where", "masked_fill", "maximum", "cast", "dropout", "rsub", "neg", "cat", "pad",
    "clamp", "index_put",
}  # fmt: skip
SHAPED = frozenset(
    ["zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full"]
)
PICKED = frozenset(
    ["slice", "select", "getitem", "topk", "cast", "unbind", "chunk", "split", "split_with_sizes", "masked_fill"]
)
WRITES = frozenset(["slice_scatter", "select_scatter", "index_put", "copy", "setitem"])
FURTHEST = 24
FEW = 8
PROJECTION = (
    "the softmax is taken of a projection by a weight, not of a product of queries and keys: "
    "a router, pooling or classifier, or the features of linear attention, which no attention rewrite applies to"
)

ADDITIVE = "no product of queries and keys feeds the softmax, but a sum of them, as in additive attention"


def paths_to_products(softmax_input: Any) -> list[tuple[Node, ...]]:
    """The ways from a product of activations down to a softmax's input; where products are added, those first whose
    operands both have all of its axes.

    Raises NotAttention when there is none.
    """
    if not isinstance(softmax_input, Node):
        raise NotAttention("the softmax is taken of a constant", softmax_input, "constant")
    paths = [tuple(reversed(path)) for path in _upward_paths(softmax_input)]
    return sorted(paths, key=lambda path: _is_broadcast(path[0]))


def _is_broadcast(node: Node) -> bool:
    product = read_product(node)
    return product is None or any(rank_of(side) != rank_of(node) for side in (product.left, product.right))


def _upward_paths(start: Node) -> list[list[Node]]:
    """The nodes from the softmax's input up to each product of two activations, the nearest first."""
    frontier: list[list[Node]] = [[start]]
    nearest: Node = start
    seen = {start}
    found: list[list[Node]] = []
    while frontier:
        path = frontier.pop(0)
        here = path[-1]
        if is_score_product(here):
            found.append(path)
            continue
        if kind(here) not in STEPS:
            nearest = nearest if kind(here) in SHAPED else here
            continue
        for operand in _score_operands(here):
            if operand not in seen:
                seen.add(operand)
                frontier.append([*path, operand])
    if not found and _mixes_scores(nearest):
        raise NotAttention("the scores are mixed by a weight before the softmax", nearest, "mixed-heads")
    if not found:
        raise NotAttention(_why_no_product(nearest), nearest, "no-product")
    return found


def _mixes_scores(node: Node) -> bool:
    """True for a product of scores by a weight: what it multiplies leads straight to a product of two activations.

    Values weighted by probabilities are such a product too, but no scores.
    """
    if not _projects(node):
        return False
    stack = [n for n in node.all_input_nodes if not is_weight(n)]
    seen = set(stack)
    while stack:
        here = stack.pop()
        if is_score_product(here):
            return not any(_is_probability(side) for side in factors(here))
        new = [n for n in _score_operands(here) if n not in seen] if kind(here) in STEPS else []
        seen.update(new)
        stack.extend(new)
    return False


def _is_probability(node: Any) -> bool:
    while kind(node) in VIEWS | {"cast", "dropout"}:
        node = arguments(node)["x"]
    return kind(node) in ("softmax", "softmax_core", "div")


def is_score_product(node: Node) -> bool:
    """True for a product of two activations that keeps an axis of each."""
    if kind(node) not in PRODUCTS:
        return False
    product = read_product(node)
    return product is not None and not is_weight(product.left) and not is_weight(product.right)


def is_weight(value: Any) -> bool:
    """True for a parameter or buffer, possibly behind views and lifted to an input: the second factor of a projection."""
    while isinstance(value, Node) and kind(value) in VIEWS | {"cast"}:
        value = arguments(value)["x"]
    if not isinstance(value, Node):
        return False
    lifted = (value.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return value.op == "get_attr" or (value.op == "placeholder" and lifted is not None)


def _why_no_product(node: Node) -> str:
    """Look further up for what the softmax is taken of."""
    name = f"the input {node.name}" if node.op == "placeholder" else named(node)
    source = node
    while (kind(source) in VIEWS | PICKED or _is_scatter(source)) and isinstance(source.args[0], Node):
        source = source.args[0]
    if _is_additive(node):
        return ADDITIVE
    frontier, seen = [node], {node}
    written: Node | None = None
    for here in frontier:
        written = here if written is None and kind(here) in WRITES else written
        if here is not node and is_score_product(here):
            return f"`{name}` between the product of queries and keys and the softmax is not understood"
        if len(seen) < FURTHEST and (not _projects(here) or (here is source and _convolves(here))):
            new = [n for n in here.all_input_nodes if n not in seen]
            seen.update(new)
            frontier.extend(new)
    if _projects(source):
        return PROJECTION
    if written is not None:
        return f"the scores are put together by writing parts into a buffer (`{kind(written)}`), not by one product"
    return f"no product of queries and keys feeds the softmax: the walk up ended at `{name}`"


def _is_additive(node: Node) -> bool:
    """True where a few operations up two activations are added that both are broadcast: one for queries, one for keys."""
    frontier, seen = [node], {node}
    for here in frontier:
        a = arguments(here) if kind(here) in ("add", "sub") else {}
        shapes = [shape_of(a[side]) for side in ("a", "b") if side in a and not is_weight(a[side])]
        if len(shapes) == 2 and all(shape is not None and len(shape) == rank_of(here) for shape in shapes):
            one, other = ([is_one(size) for size in shape or ()] for shape in shapes)
            if any(x and not y for x, y in zip(one, other, strict=True)) and any(
                y and not x for x, y in zip(one, other, strict=True)
            ):
                return True
        if len(seen) < FEW:
            new = [n for n in here.all_input_nodes if n not in seen and shape_of(n) is not None]
            seen.update(new)
            frontier.extend(new)
    return False


def named(node: Node) -> str:
    """The kind of a node, or what its own dialect calls the operation."""
    if kind(node) or not callable(node.target) or isinstance(node.target, torch._ops.OpOverload):
        return kind(node) or str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _projects(node: Node) -> bool:
    if kind(node) in PRODUCTS:
        return any(is_weight(side) for side in factors(node))
    return kind(node) in ("linear", "addmm") or _convolves(node)


def _convolves(node: Node) -> bool:
    return node.op == "call_function" and "conv" in str(getattr(node.target, "__name__", ""))


def _is_scatter(node: Node) -> bool:
    return "scatter" in str(node.target) and node.op != "placeholder"


def _score_operands(node: Node) -> list[Node]:
    a = arguments(node)
    if kind(node) == "cat":
        return [part for part in a["tensors"] if isinstance(part, Node)]
    names = {"where": ("a", "b"), "masked_fill": ("x",), "index_put": ("x",)}.get(kind(node), ("x", "a", "b"))
    rank, shape = rank_of(node), shape_of(node) or ()
    alike: list[Node] = []
    others: list[Node] = []
    for name in names:
        value = a.get(name)
        other = shape_of(value)
        if isinstance(value, Node) and other is not None and (rank_of(value) == rank or kind(node) in VIEWS):
            same = len(other) == len(shape) and all(str(x) == str(y) for x, y in zip(other, shape, strict=True))
            (alike if same else others).append(value)
    return alike + others
