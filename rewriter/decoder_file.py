"""Read the decoder stored beside an artifact's weights, so that generating needs neither capture nor transformers."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.decoder import Decoder, DecoderPrograms
from subquad.ir.errors import ArtifactError, SubquadError
from subquad.runtime.graph_file import read_graph
from subquad.runtime.layout import DecoderLayout, SiteState
from subquad.runtime.schedule_file import read_schedules
from subquad.tensor_file import TensorFile
from subquad.weight_storage import Packing, room

FORMAT = 6
GRAPHS = "decoder.json"
TENSORS = "decoder.safetensors"


def read_decoder(directory: Path, weights: Path, plan_hash: str) -> Decoder | None:
    """The stored decoder of an artifact, or None when there is none for this plan, format and version of torch.

    weights: the artifact's model.safetensors, which is read into the decoder's storage and nowhere else.
    Raises ArtifactError when the stored programs or tensors are damaged.
    """
    path = directory / GRAPHS
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["format"], data["plan_hash"], data["torch"]) != (FORMAT, plan_hash, torch.__version__):
            return None
        schedules = read_schedules(data)
        tensors = _tensors(data, directory / TENSORS, weights)
        return Decoder(DecoderPrograms(_layout(data["layout"], tensors), schedules), tensors)
    except SubquadError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); save the artifact again.") from error


def _tensors(data: dict[str, Any], beside: Path, weights: Path) -> dict[str, Tensor]:
    """Every tensor that the programs read, packed ones included, by name."""
    packing = Packing(
        tuple(tuple(part) for part in data["packing"]["parts"]),
        {tuple(part): str(name) for name, part in data["packing"]["groups"].items()},
    )
    places: dict[str, str] = data["weights"]
    with ExitStack() as stack:
        stored = stack.enter_context(TensorFile(weights))
        extra = stack.enter_context(TensorFile(beside)) if "" in places.values() else stored
        source = {name: (stored, place) if place else (extra, name) for name, place in places.items()}
        packed = [name for part in packing.parts for name in part]
        tensors = room({name: source[name][0].forms[source[name][1]] for name in packed}, packing)
        read: dict[tuple[TensorFile, str], Tensor] = {}
        for name in packed:
            file, place = source[name]
            file.read_into(place, tensors[name])
            read[file, place] = tensors[name]
        for name, (file, place) in source.items():
            if (file, place) not in read:
                read[file, place] = file.read(place)
            tensors[name] = read[file, place]
    return tensors


def _layout(data: dict[str, Any], tensors: dict[str, Tensor]) -> DecoderLayout:
    return DecoderLayout(
        None if data["history"] is None else _history(data["history"], tensors),
        tuple(data["inputs"]),
        tuple(SiteState(**(site | {"dtype": getattr(torch, site["dtype"])})) for site in data["sites"]),
        int(data["tables"]),
        tuple(data["past_axes"]),
        data["limit"],
    )


def _history(nodes: Any, tensors: dict[str, Tensor]) -> torch.fx.GraphModule:
    from subquad.ir.graph import hang

    graph = read_graph(nodes)
    holder = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            hang(holder, str(node.target), tensors[str(node.target)])
    return torch.fx.GraphModule(holder, graph)
