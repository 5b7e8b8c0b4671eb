"""Training view of a plain module: its captured graphs are run on its current parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from subquad.application import Rewritten, original_forward
from subquad.capture import capture
from subquad.ir.errors import ConversionError
from subquad.ir.graph import attribute, hang
from subquad.ir.report import Report
from subquad.ir.site import CanonicalAxes, Packed, Site
from subquad.recognition import recognise
from subquad.replacement import rewritten_capture
from subquad.training.adapters import Adapters
from subquad.training.sites import Sample, TrainingModel, TrainingSite


class GraphModel(TrainingModel):
    """A module whose forward takes token ids alone and gives logits [B, T, V], alone or first of several outputs."""

    def __init__(self, model: nn.Module, sites: list[TrainingSite], record: Rewritten) -> None:
        super().__init__(model, sites)
        if len(record.original.inputs) != 1:
            raise ConversionError(
                f"conversion feeds token ids, but {type(model).__name__} takes {', '.join(record.original.inputs)}."
            )
        self._record = record
        self._teacher = record.original.graph
        self._graphs = {True: record.original.graph, False: record.applied.graph}
        of_path = {r.prefix.rpartition(".")[0]: r.site for r in record.replacements if r.call.parameters}
        self._found = [of_path[site.path] for site in sites]
        for graph in self._graphs.values():
            for node in graph.graph.nodes:
                if node.op == "get_attr" and _has(model, node.target):
                    hang(graph, node.target, attribute(model, node.target))

    def hidden(self, ids: Tensor, original: bool = False) -> Tensor:
        """Logits [B, T, V]."""
        return self._logits(self._graphs[original], ids)

    @torch.no_grad()
    def reference(self, ids: Tensor) -> Tensor:
        """Logits of the graph captured before there were adapters; it reads the same weights."""
        return self._logits(self._teacher, ids)

    def adapt(self, targets: list[str], rank: int, alpha: int, seed: int) -> Adapters:
        """Put adapters on the named layers and capture the module again with them inside."""
        adapters = super().adapt(targets, rank, alpha, seed)
        record = self._record
        with original_forward(self.model):
            captured = capture(self.model, tuple(record.original.example.values()))
        found = {site.path: site for site in recognise(captured, Report()).sites}
        moved = tuple(replace(r, site=found[r.site.path]) for r in record.replacements)
        self._graphs = {True: captured.graph, False: rewritten_capture(captured, moved).graph}
        return adapters

    def merge(self) -> None:
        """Merge, and go back to the graphs that know no adapters; they read the same weights."""
        super().merge()
        self._graphs = {True: self._record.original.graph, False: self._record.applied.graph}

    def _logits(self, graph: torch.fx.GraphModule, ids: Tensor) -> Tensor:
        out = graph(ids)
        while isinstance(out, list | tuple):
            out = out[0]
        if not isinstance(out, Tensor) or out.dim() != 3:
            raise ConversionError(
                f"conversion needs logits [B, T, V], but {type(self.model).__name__} gives something else."
            )
        return out

    @torch.no_grad()
    def record(self, ids: Tensor) -> list[Sample]:
        """One run of the original graph, keeping the values at the sites."""
        wanted = {node for site in self._found for node in (site.q.node, site.k.node, site.v.node, site.out)}
        taken = _Taker(self._graphs[True], wanted)
        taken.run(ids)
        return [_sample(site, taken.values) for site in self._found]


def _has(root: nn.Module, target: str) -> bool:
    try:
        attribute(root, target)
    except AttributeError:
        return False
    return True


class _Taker(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.GraphModule, wanted: set[torch.fx.Node]) -> None:
        super().__init__(graph)
        self.wanted = wanted
        self.values: dict[torch.fx.Node, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def _sample(site: Site, values: dict[torch.fx.Node, Tensor]) -> Sample:
    q, k, v = (_canonical(values[o.node], o.axes, o.packed) for o in (site.q, site.k, site.v))
    return Sample(q, k, v, _canonical(values[site.out], site.out_axes, site.packed))


def _canonical(value: Tensor, axes: CanonicalAxes, packed: tuple[Packed, ...]) -> Tensor:
    """The value as [B, T, H, D]; absent axes have size one."""
    for axis, sizes in reversed(packed):
        value = value.unflatten(axis, tuple(size if isinstance(size, int) else -1 for size in sizes))
    order = [axis for group in axes for axis in group]
    rest = [axis for axis in range(value.dim()) if axis not in order]
    return value.permute(*rest, *order).reshape([math.prod(value.shape[axis] for axis in group) for group in axes])
