"""Write the casts of an autocast region of a Dynamo graph out, so that every operation shows its dtypes."""

from __future__ import annotations

import torch
import torch.fx
from torch.amp import autocast_mode

from subquad.ir.errors import CaptureError, first_line
from subquad.ir.graph import source_of, value_of
from subquad.passes.canonicalize.retrace import retrace

Node = torch.fx.Node
MARKS = (autocast_mode._enter_autocast, autocast_mode._exit_autocast)


def autocast_written_out(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph without autocast regions: those that change dtypes as core operations with casts, the others as they are.

    module: a graph of torch functions with recorded values.
    Raises CaptureError, naming the line, for a region that changes dtypes and is trained, or that cannot be run again.
    """
    if not any(node.target in MARKS for node in module.graph.nodes):
        return module
    devices = {value.device.type for n in module.graph.nodes if isinstance(value := value_of(n), torch.Tensor)}
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = torch.fx.GraphModule(module, graph)
    for region in _regions(graph):
        if any(_casts(node, devices) for node in region):
            _write_out(copied, region)
    for node in reversed([node for node in graph.nodes if node.target in MARKS]):
        graph.erase_node(node)
    copied.recompile()
    return copied


def _casts(node: Node, devices: set[str]) -> bool:
    if node.target is not autocast_mode._enter_autocast:
        return False
    device, _, enabled = (*node.args, True)[:3]
    return enabled is not False and device in devices


def _regions(graph: torch.fx.Graph) -> list[list[Node]]:
    """The outermost regions: nodes from where autocast is entered to where it is left."""
    regions: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is MARKS[0]:
            regions += [[]] if depth == 0 else []
            depth += 1
        if depth:
            regions[-1].append(node)
        depth -= node.target is MARKS[1]
    return regions


def _write_out(module: torch.fx.GraphModule, region: list[Node]) -> None:
    where = next((source_of(node) for node in region if source_of(node)), "an unknown line")
    if torch.is_grad_enabled():
        raise CaptureError(
            f"an autocast region at {where} changes dtypes in a graph that is trained; "
            "call it under torch.no_grad(), or convert the model to that dtype."
        )
    try:
        retrace(module, region, composite=False)
    except Exception as error:
        raise CaptureError(
            f"the casts of the autocast region at {where} cannot be written out: {first_line(error)}; "
            "convert the model to that dtype instead."
        ) from error
