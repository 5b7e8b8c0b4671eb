"""Cut off what a decoder's graph computes from inputs that do not grow: an encoder, keys and values of cross attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.graph_copy import submodule
from subquad.ir.graph import ancestors, value_of
from subquad.runtime.layout import BATCH, Fixed
from subquad.token_axis import Locality, expression_of, refuse

Node = torch.fx.Node


def frontier(proof: Locality, live: set[Node]) -> list[Node]:
    """The fixed values that something over the tokens reads, in order."""
    nodes = proof.given[0].graph.nodes if proof.given else ()
    read = {n for n in proof.fixed if any(u in live and u not in proof.fixed for u in n.users)}
    return [n for n in nodes if n in live and n in read]


def fixed_part(module: torch.fx.GraphModule, proof: Locality, live: set[Node]) -> Fixed | None:
    """The graph from the given inputs to the frontier; None for a model without such inputs."""
    if not proof.given:
        return None
    wanted = frontier(proof, live)
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {n: graph.placeholder(str(n.target)) for n in proof.given}
    sizes = _sizes(graph, mapping)
    for node in ancestors(wanted):
        if node in mapping or node in proof.inputs:
            continue
        value = value_of(node)
        if isinstance(value, torch.SymInt) and expression_of(value) in sizes:
            mapping[node] = sizes[expression_of(value)]
        elif any(n not in mapping for n in node.all_input_nodes):
            refuse(node, "what is computed from inputs beside the tokens reads the tokens.")
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[n] for n in wanted))
    graph.eliminate_dead_code()
    forms = tuple((value_of(n).dtype, tuple(_named(size, proof) for size in value_of(n).shape)) for n in wanted)
    return Fixed(tuple(str(n.target) for n in proof.given), submodule(module, graph), forms)


def _sizes(graph: torch.fx.Graph, inputs: dict[Node, Node]) -> dict[Any, Node]:
    """A node for every symbolic size that an input has."""
    found: dict[Any, Node] = {}
    for source, node in inputs.items():
        for axis, size in enumerate(value_of(source).shape):
            if isinstance(size, torch.SymInt) and expression_of(size) not in found:
                found[expression_of(size)] = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
    return found


def _named(size: Any, proof: Locality) -> int | str:
    if not isinstance(size, torch.SymInt):
        return int(size)
    return BATCH if expression_of(size).free_symbols & proof.batch else str(expression_of(size))
