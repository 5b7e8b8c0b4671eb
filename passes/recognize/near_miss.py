"""Find what comes nearest to attention in a graph that has none, and say what it lacks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.refusal import Refusal, refuse
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.product import PRODUCTS, read_product
from subquad.passes.recognize.provenance_terms import word
from subquad.passes.recognize.score_path import VIEWS, is_score_product

Node = torch.fx.Node
NEAREST_FIRST = (
    "defect", "mask", "soft-fill", "clamp", "step", "scale", "gain", "depends-on-scores", "mixed-heads", "guard", "sink",
    "two-products",    "denominator", "", "probabilities-used", "dropout", "values", "heads", "sizes", "layout", "softmax-axis",
    "flex", "whole", "no-values", "no-pairs", "no-product", "projection", "constant",
)  # fmt: skip
PLAIN = VIEWS | {"cast", "dropout", "slice", "select", "narrow", "getitem", "mul", "div", "add", "sub", "neg", "where",
                 "masked_fill", "tril", "triu", "clamp", "sum", "rsub"}  # fmt: skip
STEPS = 40


def nearest_miss(graph: torch.fx.Graph, refusals: Iterable[Refusal] = ()) -> Refusal:
    """The candidate closest to an attention site, as a refusal of kind and advice of its own.

    The refused softmax that fails latest; without one, two products of activations in a row; without these, a sentence on
    what the graph has instead.
    """
    refused = sorted(refusals, key=lambda r: NEAREST_FIRST.index(r.kind) if r.kind in NEAREST_FIRST else 0)
    if refused:
        return refused[0]
    products = [node for node in graph.nodes if is_score_product(node)]
    pairs = [found for node in reversed(products) if (found := _pair(node)) is not None]
    if pairs:
        return min(pairs, key=lambda r: ("no-softmax", "linear").index(r.kind))
    loose = next((n for n in graph.nodes if word(n) in ("softmax", "softmax_core", "sigmoid", "exp")), None)
    if products:
        return refuse(
            products[0], "attention",
            f"{len(products)} products of two activations were seen, but no second one weights values by the result of a first",
            "nothing",
        )  # fmt: skip
    seen = "" if loose is None else f", and `{word(loose)}` of none"
    weights = sum(
        word(n) in ("linear", "addmm", "matmul", "einsum", "convolution", "conv2d", "conv1d") for n in graph.nodes
    )
    reason = f"no product of two activations was seen{seen}: {weights} products by weights, so nothing pairs queries with keys"
    return Refusal("", "attention", reason + ".", kind="nothing")


def _pair(second: Node) -> Refusal | None:
    """A product one of whose operands comes from another product of activations, without a softmax between."""
    for operand in _operands(second):
        found = _walk(operand)
        if found is None:
            continue
        first, words = found
        if _is_over_pairs(first):
            between = " → ".join(reversed(words)) or "nothing"
            reason = f"two products of activations with {between} between them instead of a softmax"
            return refuse(second, "attention", reason, "no-softmax")
        reason = (
            "keys and values are multiplied first and queries by the result: linear attention, not softmax attention"
        )
        return refuse(second, "attention", reason, "linear")
    return None


def _operands(node: Node) -> list[Node]:
    a = arguments(node)
    values = a["operands"] if kind(node) == "einsum" else [a.get(k) for k in ("a", "b", "left", "right")]
    return [value for value in values if isinstance(value, Node)]


def _walk(start: Node) -> tuple[Node, list[str]] | None:
    """The nearest product of activations above, and the operations passed that are more than layout, scale or mask."""
    frontier: list[tuple[Node, list[str]]] = [(start, [])]
    seen = {start}
    while frontier and len(seen) < STEPS:
        here, words = frontier.pop(0)
        if kind(here) in PRODUCTS:
            if is_score_product(here):
                return here, words
            continue
        name = word(here)
        if name in ("linear", "addmm", "softmax", "softmax_core", "embedding"):
            continue
        passed = words if name in PLAIN else [*words, f"`{name}`"]
        for before in _tensors(here):
            if before not in seen:
                seen.add(before)
                frontier.append((before, passed))
    return None


def _tensors(node: Node) -> list[Node]:
    return [
        n for n in node.all_input_nodes if shape_of(n) is not None or word(n) in ("split", "chunk", "unbind", "max")
    ]


def _is_over_pairs(node: Node) -> bool:
    """True for a product over two token axes: both vary with a length, or no length varies at all.

    A sum over tokens (keys times values) has fixed sizes left and a varying one summed over.
    """
    product = read_product(node)
    if product is None:
        return False
    summed = dict(zip(product.left_labels, shape_of(product.left) or (), strict=False)).get(product.contracted)
    varying = [not isinstance(size, int) for size in (shape_of(node) or ())[-2:]]
    return all(varying) or (not any(varying) and isinstance(summed, int))
