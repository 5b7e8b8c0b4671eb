"""An einsum that sums over several axes, or weights values of several, becomes one over their product."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.canonicalize.emitting import emit
from subquad.passes.recognize.score_path import VIEWS, is_weight

Node = torch.fx.Node
aten = torch.ops.aten
BETWEEN = VIEWS | {"cast", "dropout"}


def axes_joined(module: torch.fx.GraphModule) -> None:
    """Rewrite, in place, every einsum of two activations that counts one role of attention on several axes.

    These are features that queries and keys are multiplied over (the rows of an alignment and the features of each), and
    features of the values that probabilities weight.  module: a functional graph with recorded values; sizes have to be
    known, since they are the head's.
    """
    for node in list(module.graph.nodes):
        if kind(node) == "einsum":
            stands = _joined(node)
            if stands is not None:
                node.replace_all_uses_with(stands)
                module.graph.erase_node(node)


def _joined(node: Node) -> Node | None:
    a = arguments(node)
    terms, arrow, out = str(a["equation"]).replace(" ", "").partition("->")
    labels, operands = terms.split(","), a["operands"]
    if not arrow or "." in terms or len(labels) != 2 or any(len(set(t)) != len(t) for t in (*labels, out)):
        return None
    if not all(isinstance(x, Node) and shape_of(x) is not None and not is_weight(x) for x in operands):
        return None
    if any(c not in out and c not in other for t, other in (labels, labels[::-1]) for c in t):
        return None
    summed = "".join(c for c in labels[0] if c not in out)
    values = _values(operands, labels, out)
    for group in (summed, values):
        sizes = _sizes(group, operands, labels) if len(group) > 1 else None
        if sizes is not None:
            sides = [_grouped(node, x, t, group) for x, t in zip(operands, labels, strict=True)]
            return _product(node, [s[0] for s in sides], [s[1] for s in sides], out, group, sizes)
    return None


def _values(operands: list[Node], labels: list[str], out: str) -> str:
    """The labels that only the values have, where the other operand are probabilities; none otherwise."""
    for place, probabilities in enumerate(operands):
        if _is_softmax(probabilities):
            return "".join(c for c in labels[1 - place] if c in out and c not in labels[place])
    return ""


def _is_softmax(node: Any) -> bool:
    while kind(node) in BETWEEN:
        node = arguments(node)["x"]
    return kind(node) in ("softmax", "softmax_core")


def _sizes(group: str, operands: list[Node], labels: list[str]) -> list[int] | None:
    """The sizes of some labels, the same on all operands; None where one is not a fixed number."""
    found: list[int] = []
    for label in group:
        held = [(shape_of(x) or ())[t.index(label)] for x, t in zip(operands, labels, strict=True) if label in t]
        if not all(isinstance(size, int) and size == held[0] for size in held):
            return None
        found.append(held[0])
    return found


def _grouped(node: Node, operand: Node, labels: str, group: str) -> tuple[Node, str]:
    """An operand with the axes of a group joined behind the others, and its labels."""
    if not set(group) <= set(labels):
        return operand, labels
    rest = [c for c in labels if c not in group]
    moved = emit(node, aten.permute.default, operand, [labels.index(c) for c in (*rest, *group)])
    return emit(node, aten.flatten.using_ints, moved, len(rest), -1), "".join(rest) + group[0]


def _product(node: Node, sides: list[Node], labels: list[str], out: str, group: str, sizes: list[int]) -> Node:
    """The einsum of joined operands, its result as it was."""
    kept = [c for c in out if c not in group]
    if len(kept) == len(out):
        return emit(node, aten.einsum.default, f"{labels[0]},{labels[1]}->{out}", sides)
    equation = f"{labels[0]},{labels[1]}->{''.join(kept)}{group[0]}"
    parted = emit(node, aten.unflatten.int, emit(node, aten.einsum.default, equation, sides), len(kept), sizes)
    order = [*kept, *group]
    return emit(node, aten.permute.default, parted, [order.index(c) for c in out])
