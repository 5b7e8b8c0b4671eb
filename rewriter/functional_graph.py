"""Make captured graphs functional before anything reads them: no node of theirs writes into a tensor."""

from __future__ import annotations

import warnings

import torch
import torch.fx
from torch.export import ExportedProgram

from subquad.ir.errors import CaptureError, first_line
from subquad.ir.graph import source_of
from subquad.passes.canonicalize.mutation import writes_schema


def functional_program(program: ExportedProgram) -> ExportedProgram:
    """The program with every write replaced by a value, by torch's own functionalization; itself when nothing is written.

    Composite operators (softmax, SDPA, linear, matmul) stay whole, and so do module paths and stack traces.  Buffers and
    inputs that were written are named by the new program's signature.
    Raises CaptureError, naming the line of the first write, when torch cannot do it.
    """
    writer = first_writer(program.graph_module)
    if writer is None:
        return program
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return program.run_decompositions({})
    except Exception as error:
        where = source_of(writer) or writer.format_node()
        raise CaptureError(
            f"the tensor changed in place at {where} cannot be made a value: {first_line(error)}; "
            "write it without the in-place operation."
        ) from error


def first_writer(module: torch.fx.GraphModule) -> torch.fx.Node | None:
    """The first operation, regions included, whose schema says that it writes; None in a functional graph."""
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                if node.op == "call_function" and writes_schema(node.target):
                    return node
    return None
