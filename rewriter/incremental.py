"""The incremental decoder of a model, derived from its stateless graph and cut into programs for each width class."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from subquad.application import rewritten
from subquad.blocks import cut
from subquad.capture import Capture
from subquad.decoder import Decoder, DecoderPrograms
from subquad.derivation import derive
from subquad.ir.errors import GenerationError
from subquad.narrow_graphs import few_token_graph, one_token_graph
from subquad.packing import arranged, fuse_projections, projection_groups
from subquad.step_graph import StepGraph, copied
from subquad.weight_storage import Packing, pack


def decoder(model: torch.nn.Module | Capture, others: bool = False) -> Decoder:
    """The incremental decoder of a rewritten module (or of a capture whose sites are operators).

    The model's parameters are moved into one storage (same objects, same values).  Nothing is compiled until `compile`.
    others: the model may take inputs that do not grow with the tokens (see `runtime.layout.Fixed`).
    Raises NotIncremental (a SubquadError) when the graph mixes tokens outside attention, naming node, path and source line,
    and GenerationError for a module that was not rewritten.
    """
    if isinstance(model, Capture):
        capture = model
    else:
        record = rewritten(model)
        if record is None:
            raise GenerationError(f"{type(model).__name__} was not rewritten; call subquad.rewrite first.")
        capture = record.applied
    return assembled(derive(capture.graph, others), attributes(capture.graph))


def assembled(graph: StepGraph, tensors: dict[str, Tensor]) -> Decoder:
    """The decoder of a derived graph and the tensors it reads, which are moved into one storage."""
    programs, packing = divided(graph, tensors)
    return Decoder(programs, pack(tensors, packing))


def divided(graph: StepGraph, tensors: dict[str, Tensor]) -> tuple[DecoderPrograms, Packing]:
    """The programs of a derived graph, and where its weights shall lie.

    tensors: what the graphs read, by name.  Raises GenerationError for a model with more inputs than ids and padding.
    """
    if len(graph.layout.inputs) > 2:
        taken = ", ".join(graph.layout.inputs)
        raise GenerationError(f"the model takes {taken}; a decoder gives token ids and a padding mask only.")
    groups = projection_groups(graph.step.graph, tensors)
    packing = arranged(graph.step.graph, tensors, groups)
    graphs = {"step": copied(graph.step), "first": copied(graph.first)}
    graphs |= {name: copied(module) for name, module in graph.shared.items()}
    for module in graphs.values():
        fuse_projections(module, groups)
    for name in {"step", "joined"} & graphs.keys():
        _narrow(graphs[name].graph.nodes)
    _narrow(next(iter(reversed(graphs["first"].graph.nodes))).args[0][:1])  # type: ignore[index]
    graphs |= {"one": one_token_graph(graphs["step"]), "few": few_token_graph(graphs["step"], graphs.get("joined"))}
    return DecoderPrograms(graph.layout, {name: cut(g) for name, g in graphs.items()}), packing


def _narrow(nodes: Iterable[torch.fx.Node]) -> None:
    """Mark projections of few rows: those of a step, and that to the logits, which prefill reads at the last token."""
    for node in nodes:
        if node.target is torch.ops.aten.linear.default:
            node.target = torch.ops.subquad.narrow_linear.default


def attributes(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name, tied ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
