"""The same model through Dynamo and through a core-ATen program: the sites have to be those that export shows."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from softmax_counter import short
from torch import nn
from torch.export import Dim, ExportedProgram
from zoo import call
from zoo_judge import floating

from subquad.backend import rewrite_dynamo_graph
from subquad.capture import capture
from subquad.capture_patches import capturable
from subquad.capture_values import ValueReads, branches_on_values
from subquad.ir.report import Report
from subquad.ir.site import Site
from subquad.pass_spec import parse_passes
from subquad.recognition import recognise

_INPUT = re.compile(r"\bl_(?:kwargs_|args_)?(\w+?)_(?=\W|$)")
"""How Dynamo names an input of the forward."""
_SIZE = re.compile(r"\bs\d+\b")
"""A size in the name of a mask's family, which is a number in a graph whose sizes are fixed."""


def site_words(site: Site) -> dict[str, Any]:
    """What two captures of one site have to agree on."""
    return {
        "path": site.path, "scale": site.scale, "mask": _INPUT.sub(r"\1", site.mask.family), "heads": site.heads, "kv_heads": site.kv_heads,
        "head_dim": site.head_dim, "biases": len(site.biases), "softcap": site.softcap, "sinks": site.sinks is not None,
        "source": short(site.source),
    }  # fmt: skip


def refusal_words(report: Report) -> list[tuple[str, str]]:
    """Reason and source line of each softmax or attention call that is refused; not that a graph has none."""
    return [(r.reason, short(r.source)) for r in report.refusals if r.what in ("softmax", "attention") and r.source]


@dataclass
class Compiled:
    """What a model shows under torch.compile: sites and refusals of every run of a graph, which layers may share, in the order
    in which they ran; the number of graphs; its output with `fuse` applied."""

    sites: list[Site] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    graphs: int = 0
    output: Any = None


def through_dynamo(model: nn.Module, inputs: dict[str, Any]) -> Compiled:
    """The model under torch.compile: every graph that Dynamo makes is rewritten and run as it is, without a compiler."""
    found = Compiled()

    def backend(graph: torch.fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        found.graphs += 1
        rewritten, report = rewrite_dynamo_graph(graph, example, parse_passes("fuse"))

        def run(*given: Any) -> Any:
            found.sites.extend(report.sites)
            found.refusals.extend(refusal_words(report))
            return rewritten.forward(*given)

        return run

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            found.output = call(torch.compile(model, backend=backend), inputs)
    finally:
        torch._dynamo.reset()
    return found


@dataclass
class CoreAten:
    """What a core-ATen program shows; helped: why torch alone makes none of this model, empty where it does."""

    sites: list[Site]
    refusals: list[tuple[str, str]]
    helped: list[str]


def through_core_aten(model: nn.Module, inputs: dict[str, Any], symbolic: bool = False) -> CoreAten:
    """Sites and refusals of the exported program after `run_decompositions()`: no SDPA call is left in it.  Of an output
    that holds objects the tensors are returned.

    symbolic: batch and length stay symbolic, which takes torch three times as long.  Where torch refuses the program, it is
    made as far as a capture makes it: values that the forward branches on are the example's, views are reshapes; `helped`
    of the result names what that took.
    """
    dynamic = {name: _symbolic(x) if isinstance(x, torch.Tensor) else None for name, x in inputs.items()}
    helped = []

    def exported() -> ExportedProgram:
        shapes = dynamic if symbolic else None
        return torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=False)

    with torch.no_grad(), capturable(), _tensors_only(model):
        try:
            program = exported()
        except Exception as error:
            if not branches_on_values(error):
                raise
            reads = ValueReads()
            with reads:
                model(**inputs)
            with reads.capture():
                program = exported()
            helped.append("values of tensors that the forward branches on")
    with torch.no_grad():
        try:
            decomposed = program.run_decompositions()
        except ValueError as error:
            if "Cannot view" not in str(error):
                raise
            _reshaped(program)
            decomposed = program.run_decompositions()
            helped.append("views of what a decomposition lays out otherwise")
        report = recognise(capture(decomposed), Report())
    return CoreAten(list(report.sites), refusal_words(report), helped)


def _reshaped(program: ExportedProgram) -> None:
    """Every view becomes a reshape, which holds for any strides."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


@contextmanager
def _tensors_only(model: nn.Module) -> Iterator[None]:
    """The forward returns the tensors of its output in a tuple, where that holds objects that torch.export does not know."""
    forward = model.forward

    @functools.wraps(forward)
    def returned(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(floating(forward(*args, **kwargs)))

    model.__dict__["forward"] = returned
    try:
        yield
    finally:
        del model.__dict__["forward"]


def _symbolic(tensor: torch.Tensor) -> dict[int, Any]:
    """Batch, and for text the length too."""
    return dict.fromkeys((0,) if tensor.is_floating_point() else (0, 1), Dim.AUTO)


def differences(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], whole: bool = True) -> list[str]:
    """How two lists of site words differ, in order; equal lists give none.

    Paths are compared by what stands in front of a call suffix, masks by family, numbers to six digits.  whole: False for
    sites of a forward in several graphs, of which one may get a mask that another made, and only as a tensor.
    """
    if len(one) != len(other):
        count = Counter(_plain(s["path"]) for s in one)
        count.subtract(Counter(_plain(s["path"]) for s in other))
        odd = [f"{path} {n:+d}" for path, n in count.items() if n]
        return [f"{len(one)} sites against {len(other)}: {', '.join(odd[:3])}"]
    found = []
    for a, b in zip(one, other, strict=True):
        skipped = ("path", "source") if whole else ("path", "source", "mask", "biases")
        if _SIZE.search(a["mask"]):
            skipped = (*skipped, "mask")
        odd = [f"{key} {a[key]} ≠ {b[key]}" for key in a if key not in skipped and not _equal(a[key], b[key])]
        if odd:
            found.append(f"{a['path']}: {', '.join(odd)}")
    return found


def _plain(path: str) -> str:
    return path.partition("@")[0].partition("#")[0]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5)
    return bool(a == b)
