"""Undo a forward's own choice of the last token: a copy of its graph that returns the logits of every token."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.fx
from torch.utils import _pytree as pytree

from subquad.captured import Capture
from subquad.graph_copy import copy_capture
from subquad.ir.errors import CaptureError
from subquad.ir.graph import ancestors, attribute, value_of
from subquad.passes.canonicalize.tidy import tidy
from subquad.token_axis import expression_of, is_pointwise, name_of, operator_arguments

Node = torch.fx.Node
BY_TOKEN = {"linear", "layer_norm", "rms_norm", "to", "_to_copy", "clone", "contiguous", "dropout", "mean", "softmax"}
"""Operations over the last axis alone, beside pointwise ones, that may stand between the selection and the logits."""


@dataclass(frozen=True)
class Rows:
    """Which rows of logits a forward returns: "all" [B, T, V], "last" [B, 1, V] or "last, flat" [B, V]."""

    kept: str


def with_every_row(capture: Capture) -> tuple[Capture, Rows]:
    """The capture with logits [B, T, V] as its only output, and which of these rows the forward itself returns.

    Raises CaptureError when no output is the logits of the tokens.
    """
    copied, _ = copy_capture(capture)
    graph = copied.graph.graph
    output = next(iter(reversed(graph.nodes)))
    tokens = _token_symbols(copied)
    for leaf in pytree.tree_leaves(output.args):
        value = value_of(leaf) if isinstance(leaf, Node) else None
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() not in (2, 3):
            continue
        if value.dim() == 3 and expression_of(value.shape[1]) in tokens:
            output.args = ((leaf,),)
            tidy(copied.graph)
            return copied, Rows("all")
        chosen = _selection(copied.graph, leaf)
        if chosen is not None:
            _every(chosen, leaf)
            output.args = ((leaf,),)
            tidy(copied.graph)
            return copied, Rows("last" if value.dim() == 3 else "last, flat")
    raise CaptureError("the forward returns no logits [batch, tokens, vocabulary], nor those of the last token.")


def _token_symbols(capture: Capture) -> set[object]:
    found: set[object] = set()
    for node in capture.graph.graph.nodes:
        value = value_of(node) if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor) and value.dim() == 2 and isinstance(value.shape[1], torch.SymInt):
            found |= {expression_of(value.shape[1])}
    return found


def _selection(module: torch.fx.GraphModule, leaf: Node) -> Node | None:
    """The node from which the leaf is computed token by token and that takes the last token out of [B, T, C]."""
    node = leaf
    while node.op == "call_function":
        if _takes_last(module, node):
            return node
        name = name_of(node)
        if not (is_pointwise(node) or name in BY_TOKEN) or not _over_last_axis(node):
            return None
        shape = value_of(node).shape
        above = [n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor) and n.op != "get_attr"]
        above = [n for n in above if value_of(n).dim() == len(shape)]
        if len(above) != 1:
            return None
        node = above[0]
    return None


def _over_last_axis(node: Node) -> bool:
    if name_of(node) not in ("mean", "softmax"):
        return True
    dim = operator_arguments(node).get("dim")
    return dim in (-1, [-1]) and (name_of(node) == "softmax" or operator_arguments(node).get("keepdim") is True)


def _takes_last(module: torch.fx.GraphModule, node: Node) -> bool:
    named = operator_arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(value_of(source), torch.Tensor) or value_of(source).dim() != 3:
        return False
    if node.target is torch.ops.aten.select.int:
        return bool(named["dim"] == 1 and named["index"] == -1)
    if node.target is torch.ops.aten.slice.Tensor:
        last = named.get("end") is None or named["end"] >= 2**62
        return bool(named.get("dim") == 1 and named.get("start") == -1 and last and named.get("step", 1) == 1)
    if node.target is torch.ops.aten.index.Tensor:
        places = list(named["indices"])
        return len(places) == 2 and places[0] is None and _constant(module, places[1]) == [-1]
    return False


def _constant(module: torch.fx.GraphModule, node: object) -> object:
    while isinstance(node, Node) and name_of(node) in ("lift_fresh_copy", "clone", "alias", "detach"):
        node = node.args[0]
    if isinstance(node, Node) and node.op == "get_attr":
        return attribute(module, str(node.target)).tolist()
    return None


def _every(chosen: Node, leaf: Node) -> None:
    """Replace the selection by what it selects from, and record the new shapes down to the leaf."""
    source = chosen.args[0]
    assert isinstance(source, Node)
    below = [n for n in ancestors([leaf]) if n is leaf or chosen in ancestors([n])]
    chosen.replace_all_uses_with(source, delete_user_cb=lambda user: user in below)
    mode = value_of(source).fake_mode
    with mode, torch.no_grad():
        for node in below:
            if node is chosen or node.target is operator.getitem:
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value_of)  # type: ignore[arg-type, misc]
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
