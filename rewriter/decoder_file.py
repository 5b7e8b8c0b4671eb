"""Store a derived decoder beside the weights, so that generating from an artifact needs neither capture nor transformers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.application import Rewritten
from subquad.derivation import derive
from subquad.incremental import Decoder, attributes
from subquad.ir.errors import ArtifactError, SubquadError
from subquad.ir.graph import hang
from subquad.runtime.graph_file import read_graph, write_graph
from subquad.runtime.step_graph import SiteState, StepGraph
from subquad.token_axis import NotIncremental

FORMAT = 1
GRAPHS = "decoder.json"
TENSORS = "decoder.safetensors"


def write_decoder(record: Rewritten, model: nn.Module, directory: Path, stored: set[str]) -> str | None:
    """Derive the decoder of a rewritten model and store it; returns why not when the model cannot be decoded step by step.

    stored: names of the tensors already in the artifact's weights file; what the graphs read beside them (tables,
    constants, non-persistent buffers) goes to decoder.safetensors.
    """
    try:
        graph = derive(record.applied.graph)
        data = _described(graph)
    except NotIncremental as refusal:
        return str(refusal)
    except ArtifactError as error:
        return str(error)
    tensors = attributes(record.applied.graph)
    places, extra = _places(sorted(_names(graph)), tensors, model, stored)
    data |= {"format": FORMAT, "plan_hash": record.plan.hash, "torch": torch.__version__, "weights": places}
    (directory / GRAPHS).write_text(json.dumps(data), encoding="utf-8")
    if extra:
        from safetensors.torch import save_file

        (directory / TENSORS).touch()
        mode = (directory / TENSORS).stat().st_mode
        save_file(extra, str(directory / TENSORS))
        (directory / TENSORS).chmod(mode)
    return None


def _described(graph: StepGraph) -> dict[str, Any]:
    sites = [asdict(site) | {"dtype": str(site.dtype).removeprefix("torch.")} for site in graph.sites]
    return {
        "step": write_graph(graph.step.graph),
        "first": write_graph(graph.first.graph),
        "history": None if graph.history is None else write_graph(graph.history.graph),
        "inputs": list(graph.inputs),
        "sites": sites,
        "tables": graph.tables,
        "past_axes": list(graph.past_axes),
        "limit": graph.limit,
    }


def _modules(graph: StepGraph) -> list[torch.fx.GraphModule]:
    return [module for module in (graph.step, graph.first, graph.history) if module is not None]


def _names(graph: StepGraph) -> set[str]:
    return {str(n.target) for module in _modules(graph) for n in module.graph.nodes if n.op == "get_attr"}


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


def read_decoder(directory: Path, weights: Path, plan_hash: str) -> Decoder | None:
    """The stored decoder of an artifact, or None when there is none for this plan and version of torch.

    weights: the artifact's model.safetensors.  Raises ArtifactError when the stored graphs or tensors are damaged.
    """
    path = directory / GRAPHS
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["format"], data["plan_hash"], data["torch"]) != (FORMAT, plan_hash, torch.__version__):
            return None
        return Decoder(*_rebuilt(data, _tensors(data["weights"], directory, weights)))
    except SubquadError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); save the artifact again.") from error


def _tensors(places: dict[str, str], directory: Path, weights: Path) -> dict[str, Tensor]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    extra = load_file(str(directory / TENSORS)) if (directory / TENSORS).is_file() else {}
    loaded: dict[str, nn.Parameter] = {}
    with safe_open(str(weights), framework="pt") as file:
        for place in dict.fromkeys(place for place in places.values() if place):
            loaded[place] = nn.Parameter(file.get_tensor(place), requires_grad=False)
    return {name: loaded[place] if place else extra[name] for name, place in places.items()}


def _rebuilt(data: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[StepGraph, dict[str, Tensor]]:
    modules = {name: _module(data[name], tensors) for name in ("step", "first", "history")}
    step, first = modules["step"], modules["first"]
    if step is None or first is None:
        raise ValueError("it lacks a graph")
    sites = tuple(SiteState(**(site | {"dtype": getattr(torch, site["dtype"])})) for site in data["sites"])
    graph = StepGraph(
        step,
        first,
        modules["history"],
        tuple(data["inputs"]),
        sites,
        data["tables"],
        tuple(data["past_axes"]),
        data["limit"],
    )
    return graph, tensors


def _module(nodes: Any, tensors: dict[str, Tensor]) -> torch.fx.GraphModule | None:
    if nodes is None:
        return None
    graph = read_graph(nodes)
    holder = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            hang(holder, node.target, tensors[node.target])
    return torch.fx.GraphModule(holder, graph)
