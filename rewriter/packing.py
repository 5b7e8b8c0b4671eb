"""Find projections that read one input, make them one, and lay the weights out in the order they are read."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch import Tensor

from subquad.step_graph import sweep
from subquad.weight_storage import Packing

Node = torch.fx.Node
Groups = dict[tuple[str, ...], str]


def projection_groups(graph: torch.fx.Graph, weights: dict[str, Tensor]) -> Groups:
    """Names of projection weights (and biases) that read the same input, by the name of their packed form."""
    by_input: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.target is torch.ops.aten.linear.default and all(n.op == "get_attr" for n in _parameters(node)):
            by_input.setdefault(_input(node), []).append(node)
    groups: Groups = {}
    taken: set[int] = set()
    for nodes in by_input.values():
        names, biases = _names(nodes)
        tensors = [weights[name] for name in (*names, *biases)]
        kinds = [{(weights[n].dtype, weights[n].shape[1:]) for n in part} for part in (names, biases)]
        alike = len(kinds[0]) == 1 and len(kinds[1]) <= 1 and len(biases) in (0, len(names))
        if (
            len(nodes) < 2
            or not alike
            or not all(isinstance(t, torch.nn.Parameter) for t in tensors)
            or len({id(t) for t in tensors}) < len(tensors)
            or taken & {id(t) for t in tensors}
        ):
            continue
        taken |= {id(t) for t in tensors}
        for part in (names, biases):
            if part:
                groups[part] = f"packed_{len(groups)}"
    return groups


def fuse_projections(module: torch.fx.GraphModule, groups: Groups) -> None:
    """Replace the projections of each group by one and a split, in place."""
    graph = module.graph
    by_input: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            by_input.setdefault(_input(node), []).append(node)
    for x, nodes in by_input.items():
        names, biases = _names(nodes)
        if names not in groups:
            continue
        sizes = [_rows(module, name) for name in names]
        for part in filter(None, (names, biases)):
            module.register_buffer(groups[part], torch.empty(0, device="meta"))
        with graph.inserting_before(nodes[0]):
            parameters = [graph.create_node("get_attr", groups[part]) for part in (names, biases) if part]
            joint = graph.call_function(torch.ops.aten.linear.default, (x, *parameters))
            parts = graph.call_function(torch.ops.aten.split_with_sizes.default, (joint, sizes, -1))
            joint.meta.update(nodes[0].meta)
            for n, node in enumerate(nodes):
                piece = graph.call_function(operator.getitem, (parts, n))
                piece.meta.update(node.meta)
                node.replace_all_uses_with(piece)
        for node in nodes:
            graph.erase_node(node)
    sweep(graph)


def _input(linear: Node) -> Node:
    return linear.all_input_nodes[0]


def _parameters(linear: Node) -> list[Node]:
    """Weight and bias of a projection."""
    return [n for n in linear.args[1:] if isinstance(n, Node)]


def _names(nodes: list[Node]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the weights and of the biases of several projections."""
    parameters = [[str(n.target) for n in _parameters(node)] for node in nodes]
    return tuple(p[0] for p in parameters), tuple(p[1] for p in parameters if len(p) > 1)


def _rows(module: torch.fx.GraphModule, name: str) -> int:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return int(value.shape[0])


def arranged(graph: torch.fx.Graph, weights: dict[str, Tensor], groups: Groups) -> Packing:
    """The parameters that a graph reads in the order of first use, each tensor once; groups stay together."""
    part_of = {name: part for part in groups for name in part}
    parts: list[tuple[str, ...]] = []
    seen: set[int] = set()
    for name in _by_use(graph):
        part = part_of.get(name, (name,))
        if id(weights[part[0]]) not in seen and all(isinstance(weights[n], torch.nn.Parameter) for n in part):
            seen |= {id(weights[n]) for n in part}
            parts.append(part)
    return Packing(tuple(parts), {part: name for part, name in groups.items() if part in parts})


def _by_use(graph: torch.fx.Graph) -> list[str]:
    """Weight names in the order in which the graph first reads them."""
    order = {node: n for n, node in enumerate(graph.nodes)}
    first: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            first[str(node.target)] = min((order[u] for u in node.users), default=0)
    return sorted(first, key=lambda name: first[name])
