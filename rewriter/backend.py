"""`torch.compile(backend="subquad")`: rewrite the graph Dynamo hands over, then let the inner backend compile it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch._dynamo.backends.registry import lookup_backend

from subquad.capture import Capture
from subquad.emission import emit_site
from subquad.graph_copy import carry_site, copy_capture
from subquad.ir.contract import Contract
from subquad.ir.errors import PassError
from subquad.ir.report import Report
from subquad.ir.rewrite import Rewrite
from subquad.pass_spec import parse_passes
from subquad.passes.canonicalize.tidy import tidy
from subquad.pipeline import EXACT_DEFAULT, is_selected
from subquad.recognition import recognise

log = logging.getLogger(__name__)
reports: list[Report] = []
"""The reports of the graphs compiled in this process, newest last; read it after the first call of a compiled module."""
KEEP = 64
OPTIONS = {"passes", "where", "inner"}


def compile_graph(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that torch.compile finds by entry point.

    graph: Dynamo's graph.  options: passes (as for `subquad.rewrite`; exact ones by default), where (a pattern for module
    paths), inner (the backend that compiles the result, "inductor" by default).  Passes that learn parameters cannot be
    applied here, because a compiled function has no module to keep them: rewrite the module first.
    Raises PassError for an unknown option or pass.
    """
    options = dict(options or {})
    unknown = set(options) - OPTIONS
    if unknown:
        raise PassError(
            f"the subquad backend has no option {sorted(unknown)[0]!r}; known: {', '.join(sorted(OPTIONS))}."
        )
    passes = parse_passes(options.get("passes", EXACT_DEFAULT))
    for chosen in passes:
        if chosen.contract is Contract.APPROXIMATE:
            raise PassError(
                f"{chosen.name} learns parameters, which a compiled function cannot keep; use subquad.rewrite first."
            )
    rewritten, report = rewrite_dynamo_graph(graph, example_inputs, passes, options.get("where"))
    reports.append(report)
    del reports[:-KEEP]
    inner = lookup_backend(options.get("inner", "inductor"))
    compiled: Callable[..., Any] = inner(rewritten, list(example_inputs))
    return compiled


def rewrite_dynamo_graph(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], passes: list[Rewrite], where: str | None = None
) -> tuple[torch.fx.GraphModule, Report]:
    """The graph with every admitted site replaced, and the report; sites that no pass admits stay as they are."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    capture = Capture(
        graph,
        graph,
        tuple(node.name for node in placeholders),
        "torch",
        {},
        known_tensors=_fixed(placeholders, example_inputs),
    )
    report = recognise(capture, Report())
    copied, mapping = copy_capture(capture)
    for site in report.sites:
        if where is not None and not is_selected(site.path, where):
            continue
        refusals = []
        for chosen in passes:
            refusal = chosen.admits(site)
            if refusal is None:
                emit_site(copied.graph, carry_site(site, mapping), chosen.operator(site), {}, "")
                report.applied.append(
                    {
                        "path": site.path,
                        "pass": str(chosen),
                        "contract": chosen.contract.value,
                        "mask": site.mask.family,
                    }
                )
                break
            refusals.append(refusal)
        else:
            report.refused.extend(refusals)
    tidy(copied.graph)
    for refusal in (*report.refusals, *report.refused):
        log.info("%s", refusal)
    return copied.graph, report


def _fixed(placeholders: list[torch.fx.Node], example_inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Buffers that Dynamo lifted to inputs: their content is known at compile time and guarded by identity."""
    fixed = {}
    for node, value in zip(placeholders, example_inputs, strict=False):
        static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
        if (
            static is not None
            and isinstance(value, torch.Tensor)
            and not isinstance(value, torch._subclasses.FakeTensor)
        ):
            if not value.requires_grad:
                fixed[node.name] = value
    return fixed
