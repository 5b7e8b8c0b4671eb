"""Derive the decoder of a rewritten model and store it beside the weights: its programs, its layout, its own tensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.application import Rewritten
from subquad.decoder_file import FORMAT, GRAPHS, TENSORS
from subquad.derivation import derive
from subquad.incremental import attributes, divided
from subquad.input_forms import find_forms
from subquad.ir.errors import ArtifactError, GenerationError
from subquad.runtime.graph_file import write_graph
from subquad.runtime.layout import DecoderLayout
from subquad.runtime.schedule_file import write_schedules
from subquad.step_graph import StepGraph
from subquad.tensor_writing import write_tensors
from subquad.token_axis import NotIncremental
from subquad.weight_storage import form_of, with_groups


def write_decoder(record: Rewritten, model: nn.Module, directory: Path, stored: set[str]) -> str | None:
    """Derive the decoder of a rewritten model and store it; returns why not when the model cannot be decoded step by step.

    stored: names of the tensors already in the artifact's weights file; what the graphs read beside them (tables,
    constants, non-persistent buffers) goes to decoder.safetensors.
    """
    tensors = attributes(record.applied.graph)
    try:
        graph = derive(record.applied.graph)
        programs, packing = divided(graph, tensors)
        find_forms(programs, with_groups({name: form_of(tensors[name]) for name in _names(graph)}, packing))
        data = write_schedules(programs.schedules) | {"layout": _described(graph.layout)}
    except (NotIncremental, ArtifactError, GenerationError) as refusal:
        return str(refusal)
    places, extra = _places(sorted(_names(graph)), tensors, model, stored)
    data |= {
        "format": FORMAT,
        "plan_hash": record.plan.hash,
        "torch": torch.__version__,
        "weights": places,
        "packing": {"parts": packing.parts, "groups": {name: list(part) for part, name in packing.groups.items()}},
    }
    (directory / GRAPHS).write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
    if extra:
        write_tensors(extra, directory / TENSORS)
    return None


def _described(layout: DecoderLayout) -> dict[str, Any]:
    return {
        "history": None if layout.history is None else write_graph(layout.history.graph),
        "inputs": list(layout.inputs),
        "sites": [asdict(site) | {"dtype": str(site.dtype).removeprefix("torch.")} for site in layout.sites],
        "tables": layout.tables,
        "past_axes": list(layout.past_axes),
        "limit": layout.limit,
    }


def _names(graph: StepGraph) -> set[str]:
    modules = [m for m in (graph.step, graph.first, *graph.shared.values(), graph.layout.history) if m is not None]
    return {str(n.target) for module in modules for n in module.graph.nodes if n.op == "get_attr"}


def _places(
    names: list[str], tensors: dict[str, Tensor], model: nn.Module, stored: set[str]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """For each name the stored tensor it is (its own name, the name of its twin, or one in decoder.safetensors)."""
    twins = {id(value): name for name, value in model.state_dict(keep_vars=True).items() if name in stored}
    places: dict[str, str] = {}
    extra: dict[str, Tensor] = {}
    for name in names:
        twin = name if name in stored else twins.get(id(tensors[name]))
        if twin is None:
            extra[name] = tensors[name].detach().cpu().contiguous().clone()
        places[name] = twin or ""
    return places, extra
