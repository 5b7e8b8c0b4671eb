"""Drop autocast regions of a Dynamo graph that change nothing."""

from __future__ import annotations

import torch
import torch.fx
from torch.amp import autocast_mode

from subquad.ir.errors import CaptureError
from subquad.ir.graph import source_of, value_of


def without_idle_autocast(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph without the autocast regions that are off or for a device that it has no tensors on.

    Raises CaptureError for a region that changes dtypes, in which no operator could be replaced by an equal one.
    """
    entries = [node for node in module.graph.nodes if node.target is autocast_mode._enter_autocast]
    if not entries:
        return module
    devices = {value.device.type for n in module.graph.nodes if isinstance(value := value_of(n), torch.Tensor)}
    for node in entries:
        device, _, enabled = (*node.args, True)[:3]
        if enabled is not False and device in devices:
            raise CaptureError(
                f"an autocast region at {_line_after(node)} changes dtypes inside the graph; "
                "convert the model to that dtype instead."
            )
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in reversed(list(graph.nodes)):
        if node.target in (autocast_mode._enter_autocast, autocast_mode._exit_autocast):
            graph.erase_node(node)
    return torch.fx.GraphModule(module, graph)


def _line_after(node: torch.fx.Node) -> str:
    """The line of the first operation in a region; its entry has none of its own."""
    while node.op != "output":
        if where := source_of(node):
            return where
        node = node.next
    return "an unknown line"
