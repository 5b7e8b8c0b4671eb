"""Rewrite a step graph for one row and one token: attention in its one-token forms."""

from __future__ import annotations

import ast

import torch
import torch.fx

from subquad.kernels.spec import SoftmaxSpec
from subquad.runtime import one_token
from subquad.step_graph import sweep
from subquad.token_axis import operator_arguments

Node = torch.fx.Node


def one_token_graph(step: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a step graph that computes the same for B = w = 1; masks are evaluated once, not once a layer."""
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(step.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    inputs = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    masks: dict[tuple[object, ...], Node] = {}
    for size in list(inputs["queries"].users):
        if size.target is torch.ops.aten.sym_size.int:
            size.replace_all_uses_with(1)  # type: ignore[arg-type]
    for node in list(graph.nodes):
        if node.target is torch.ops.subquad.recurrence.default:
            _recurrence(node, inputs["real"])
        elif node.target is torch.ops.subquad.softmax_attention.default:
            _attention(graph, node, inputs, masks)
        elif node.target is torch.ops.aten.index_put_.default:
            _write(graph, node)
    sweep(graph)
    return torch.fx.GraphModule(step, graph)


def _write(graph: torch.fx.Graph, node: Node) -> None:
    """One slot of one row is written."""
    buffer, index, new = node.args
    assert isinstance(index, (list, tuple))
    places = index[1]
    with graph.inserting_before(node):
        row = graph.call_function(torch.ops.aten.unsqueeze.default, (new, 0))
    node.target, node.args = torch.ops.aten.index_copy_.default, (buffer, 1, places, row)


def _recurrence(node: Node, real: Node) -> None:
    """The traceable form; the token is real unless the model's own padding says no."""
    named = operator_arguments(node)
    valid = named["valid"]
    named["valid"] = None if valid is real else valid.args[1]
    node.target, node.args = one_token.recur, tuple(named.values())


def _attention(
    graph: torch.fx.Graph, node: Node, inputs: dict[str, Node], masks: dict[tuple[object, ...], Node]
) -> None:
    """The one-token form, unless the mask differs by head or the log-sum-exp is read: then the operator stays."""
    named = operator_arguments(node)
    mask = SoftmaxSpec.parse(named["spec"]).mask
    if mask is None or _reads_head(mask) or any(user.args[1] != 0 for user in node.users):
        return
    tree = f" & t{len(named['operands']) - 1}[b, i, j]"
    assert mask.endswith(tree)
    mask, tables = mask.removesuffix(tree), named["operands"][:-1]
    key = (mask, *tables, *named["scalars"])
    with graph.inserting_before(node):
        if key not in masks:
            masks[key] = graph.call_function(
                one_token.visible_keys, (inputs["columns"], inputs["keys"], tables, named["scalars"], mask)
            )
        out = graph.call_function(
            one_token.attend, (named["q"], named["k"][0], named["v"][0], masks[key], named["sinks"], named["spec"])
        )
    for user in list(node.users):
        out.meta.update(user.meta)
        user.replace_all_uses_with(out)
        graph.erase_node(user)
    graph.erase_node(node)


def _reads_head(mask: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "h" for n in ast.walk(ast.parse(mask)))
