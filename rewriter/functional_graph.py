"""Make an exported program functional by torch's own means, and tell whether a graph is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.fx
from torch.export import ExportedProgram

from subquad.ir.errors import CaptureError, first_line
from subquad.ir.graph import source_of
from subquad.passes.canonicalize.mutation import writes_schema


def functional_program(program: ExportedProgram) -> ExportedProgram:
    """The program with every write replaced by a value, and every cast of an autocast region written out, by torch's own
    functionalization; itself when there is nothing of the kind.

    Composite operators (softmax, SDPA, linear, matmul) stay whole, and so do module paths and stack traces.  Buffers and
    inputs that were written are named by the new program's signature.
    Raises CaptureError, naming the line of the first write, when torch cannot do it.
    """
    operations = _operations(program.graph_module)
    writer = next((n for n in operations if writes_schema(n.target) or _is_vmap(n) or _is_autocast(n)), None)
    if writer is None:
        return program
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return program.run_decompositions({})
    except Exception as error:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        where = source_of(writer) or writer.format_node()
        raise CaptureError(
            f"what {where} changes in place, or does under vmap or autocast, cannot be made a value: {first_line(error)}; "
            "write it without."
        ) from error


def first_writer(module: torch.fx.GraphModule) -> torch.fx.Node | None:
    """The first operation, regions included, whose schema says that it writes; None in a functional graph."""
    return next((node for node in _operations(module) if writes_schema(node.target)), None)


def holds_modes(module: torch.fx.GraphModule) -> bool:
    """True when the graph's operations mean what they say only inside torch.vmap or an autocast region."""
    return any(_is_vmap(node) or _is_autocast(node) for node in _operations(module))


def _is_vmap(node: torch.fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _is_autocast(node: torch.fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "wrap_with_autocast" and bool(node.args[2])


def _operations(module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from (node for node in part.graph.nodes if node.op == "call_function")
