"""Put the regions of higher-order operators that only mark a part of the graph in their place."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

Node = torch.fx.Node
MARKS = frozenset({"wrap", "invoke_subgraph", "tag_activation_checkpoint", "wrap_activation_checkpoint"})
"""Operators whose region computes the same outside them."""
RECOMPUTED = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint"})
"""Of those, the ones that save memory for the backward pass."""


def inlined(module: torch.fx.GraphModule, training: bool) -> torch.fx.GraphModule:
    """The graph with every region that is only marked put in its place; the module itself when there is none.

    training: keeps regions that a backward pass computes again.
    """
    while any(region_of(module, node, training) is not None for node in module.graph.nodes):
        module = _one_level(module, training)
    return module


def _one_level(module: torch.fx.GraphModule, training: bool) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    mapping: dict[Node, Any] = {}
    for node in module.graph.nodes:
        region = region_of(module, node, training)
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], lambda n: mapping[n])).meta = dict(node.meta)
        elif region is not None:
            mapping[node] = _put(graph, region, [mapping[n] for n in _operands(module, node)])
        elif node.target is operator.getitem and isinstance(mapping[node.args[0]], tuple | list):
            mapping[node] = mapping[node.args[0]][node.args[1]]
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    return torch.fx.GraphModule(module, graph)


def region_of(module: torch.fx.GraphModule, node: Node, training: bool) -> torch.fx.GraphModule | None:
    """The region of a node that only marks it, None for any other node."""
    name = getattr(node.target, "__name__", "")
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or name not in MARKS:
        return None
    if training and name in RECOMPUTED:
        return None
    return next((found for arg in node.args if (found := _graph(module, arg)) is not None), None)


def _graph(module: torch.fx.GraphModule, arg: Any) -> torch.fx.GraphModule | None:
    if not isinstance(arg, Node) or arg.op != "get_attr":
        return None
    value: Any = module
    for part in str(arg.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.fx.GraphModule) else None


def _operands(module: torch.fx.GraphModule, node: Node) -> list[Node]:
    return [arg for arg in node.args if isinstance(arg, Node) and _graph(module, arg) is None]


def _put(graph: torch.fx.Graph, region: torch.fx.GraphModule, operands: list[Any]) -> Any:
    inside: dict[Node, Any] = {}
    given = iter(operands)
    for step in region.graph.nodes:
        if step.op == "placeholder":
            inside[step] = next(given)
        elif step.op == "output":
            return torch.fx.map_arg(step.args[0], lambda n: inside[n])
        else:
            inside[step] = graph.node_copy(step, lambda n: inside[n])
    raise AssertionError("a region without an output")
