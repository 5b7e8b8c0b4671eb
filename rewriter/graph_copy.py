"""Copy a capture so that it can be edited, and carry findings over to the copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.fx

from subquad.capture import Capture
from subquad.ir.graph import attribute, hang
from subquad.ir.mask import Mask
from subquad.ir.site import Operand, ScoreTensor, Site

Node = torch.fx.Node


def _same(value: Any) -> Any:
    return value


def copy_capture(capture: Capture, convert: Callable[[Any], Any] = _same) -> tuple[Capture, dict[Node, Node]]:
    """A capture with its own graph, and the map from old to new nodes.

    convert: what each parameter, buffer and leaf module becomes; by default the copy shares the same objects.
    """
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(capture.graph.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    attributes = torch.nn.Module()
    for name, parameter in capture.graph.named_parameters(remove_duplicate=False):
        hang(attributes, name, convert(parameter))
    for name, buffer in capture.graph.named_buffers(remove_duplicate=False):
        hang(attributes, name, convert(buffer))
    for name in {str(n.target) for n in graph.nodes if n.op == "call_module"}:
        hang(attributes, name, convert(capture.graph.get_submodule(name)))
    for node in graph.nodes:
        region = attribute(capture.graph, str(node.target)) if node.op == "get_attr" else None
        if isinstance(region, torch.nn.Module):
            hang(attributes, str(node.target), region)
    return replace(capture, graph=torch.fx.GraphModule(attributes, graph)), mapping


def submodule(source: torch.fx.GraphModule, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A graph of its own over the parameters of another, which stay the same objects."""
    holder = torch.nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            hang(holder, str(node.target), attribute(source, str(node.target)))
    return torch.fx.GraphModule(holder, graph)


def carry_site(site: Site, mapping: dict[Node, Node]) -> Site:
    """The same site in the copied graph."""

    def operand(o: Operand) -> Operand:
        return replace(o, node=mapping[o.node])

    def over_scores(tensor: Any) -> Any:
        return replace(tensor, node=mapping[tensor.node]) if isinstance(tensor, ScoreTensor) else tensor

    mask = site.mask
    moved = Mask(
        mask.predicate,
        tuple(replace(t, node=mapping[t.node]) for t in mask.tables),
        mask.empty_rows,
        None,
        mask.evidence,
    )
    return replace(
        site, q=operand(site.q), k=operand(site.k), v=operand(site.v), out=mapping[site.out], mask=moved,
        biases=tuple(over_scores(b) for b in site.biases), gain=over_scores(site.gain), sinks=over_scores(site.sinks),
        absorbed=tuple(mapping[n] for n in site.absorbed),
        mask_sources=tuple(mapping[n] for n in site.mask_sources), provenance=None,
    )  # fmt: skip
