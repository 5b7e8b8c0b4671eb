"""Write what torch.vmap maps out over the mapped axes, so that every operation of the graph says what it does."""

from __future__ import annotations

import torch
import torch.fx

from subquad.ir.errors import CaptureError, first_line
from subquad.ir.graph import source_of
from subquad.passes.canonicalize.retrace import retrace

Node = torch.fx.Node
BEGIN, END = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def vmap_written_out(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same computation without the steps of torch.vmap; the module itself when it has none.

    module: a graph of torch functions with recorded values.  Softmax, SDPA and products inside a mapped function become
    the core operations that torch's batching rules give.
    Raises CaptureError, naming the line, for a mapped function that these rules do not cover, and for any other transform
    of torch.func, whose steps hold only in the order they stand in.
    """
    if not any(_is_transform(node) for node in module.graph.nodes):
        return module
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = torch.fx.GraphModule(module, graph)
    for region in _regions(graph):
        _write_out(copied, region)
    left = [node for node in graph.nodes if _is_transform(node)]
    for node in reversed(left):
        if _name(node) != "lazy_load_decompositions":
            raise CaptureError(f"`{_name(node)}` at {_line(node)} is a transform of torch.func; write it without.")
        graph.erase_node(node)
    copied.recompile()
    return copied


def _write_out(module: torch.fx.GraphModule, region: list[Node]) -> None:
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        if any("set_grad_enabled" in _name(node) for node in region):
            raise ValueError("it turns gradients on or off inside")
        retrace(module, region, composite=False)
    except Exception as error:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        raise CaptureError(
            f"what torch.vmap maps at {_line(region[0])} cannot be written out: {first_line(error)}"
        ) from error


def _regions(graph: torch.fx.Graph) -> list[list[Node]]:
    """The outermost mapped stretches of a graph: nodes from where the nesting begins to where it ends."""
    regions: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if _name(node) == BEGIN:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        if _name(node) == END:
            depth -= 1
    return regions


def _is_transform(node: Node) -> bool:
    return "_functorch" in str(getattr(node.target, "__module__", ""))


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _line(node: Node) -> str:
    """The line of the first operation of a region; its steps have none of their own."""
    while node.op != "output":
        if where := source_of(node):
            return where
        node = node.next
    return "an unknown line"
