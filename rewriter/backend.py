"""`torch.compile(backend="subquad")`: rewrite the graph Dynamo hands over, then let the inner backend compile it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch._dynamo.backends.registry import lookup_backend

from subquad.application import network_entry
from subquad.capture import Capture
from subquad.emission import emit_site
from subquad.graph_copy import carry_site, copy_capture
from subquad.ir.contract import Contract
from subquad.ir.errors import CaptureError, PassError, first_line
from subquad.ir.network_rewrite import NetworkRewrite
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report
from subquad.ir.rewrite import Rewrite
from subquad.pass_spec import parse_passes, parse_request
from subquad.passes.canonicalize.autocast import autocast_written_out
from subquad.passes.canonicalize.flex_attention import flex_written_out
from subquad.passes.canonicalize.functional import functional
from subquad.passes.canonicalize.lifted_numbers import read_lifted_numbers
from subquad.passes.canonicalize.mapped import vmap_written_out
from subquad.passes.canonicalize.plain import made_plain
from subquad.passes.canonicalize.regions import inlined
from subquad.passes.canonicalize.tidy import tidy
from subquad.passes.canonicalize.torch_layers import layers_written_out
from subquad.pipeline import applied_entry, choose, is_selected
from subquad.recognition import recognise, refused_whole
from subquad.unrolled_run import UnrolledLoop, unrolled_loop

log = logging.getLogger(__name__)
reports: list[Report] = []
"""The reports of the graphs compiled in this process, newest last; read it after the first call of a compiled module."""
KEEP = 64
OPTIONS = {"passes", "where", "inner"}


def compile_graph(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that torch.compile finds by entry point.

    graph: Dynamo's graph.  options: passes (as for `subquad.rewrite`; without them the exact ones that are predicted to
    pay), where (a pattern for module paths), inner (the backend that compiles the result, "inductor" by default).  Passes
    that learn parameters cannot be applied here, because a compiled function has no module to keep them: rewrite the module
    first.
    Raises PassError for an unknown option or pass.
    """
    options = dict(options or {})
    unknown = set(options) - OPTIONS
    if unknown:
        raise PassError(
            f"the subquad backend has no option {sorted(unknown)[0]!r}; known: {', '.join(sorted(OPTIONS))}."
        )
    passes, named, network = (None, None, None) if options.get("passes") is None else parse_request(options["passes"])
    if named is not None:
        raise PassError(f"{named.name} rewrites the decoding loop of a model; give it to subquad.rewrite.")
    for chosen in passes or ():
        if chosen.contract is Contract.APPROXIMATE:
            raise PassError(
                f"{chosen.name} learns parameters, which a compiled function cannot keep; use subquad.rewrite first."
            )
    loop = _loop(graph) if passes is None and options.get("where") is None else None
    if loop is not None and not loop.differentiable:
        reports.append(loop.report)
        return _looping(loop, lambda: _compiled(graph, example_inputs, passes, options, network))
    return _compiled(graph, example_inputs, passes, options, network)


def _loop(graph: torch.fx.GraphModule) -> UnrolledLoop | None:
    """The decoding loop that was unrolled into a graph; None when there is none, or when it cannot be rolled up."""
    try:
        return unrolled_loop(graph, Report())
    except Exception:
        log.exception("subquad leaves an unrolled loop as it is, because of an error of its own")
        return None


def _looping(loop: UnrolledLoop, compiled: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The loop rolled up; from the call after one in which a guard failed, the graph compiled as it is."""
    otherwise: list[Callable[..., Any]] = []

    def run(*inputs: Any) -> Any:
        if loop.model.refused is None:
            return loop(*inputs)
        if not otherwise:
            otherwise.append(compiled())
        return otherwise[0](*inputs)

    return run


def _compiled(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    passes: list[Rewrite] | None,
    options: dict[str, Any],
    network: NetworkRewrite | None,
) -> Callable[..., Any]:
    rewritten, report = _rewritten(graph, example_inputs, passes, options.get("where"), network)
    reports.append(report)
    del reports[:-KEEP]
    inner = lookup_backend(options.get("inner", "inductor"))
    compiled: Callable[..., Any]
    try:
        compiled = inner(rewritten, list(example_inputs))
    except Exception as error:
        if rewritten is graph:
            raise
        log.exception("the inner backend does not compile the rewritten graph; it compiles the original one")
        report.applied = []
        report.rolled_back = [
            Refusal("", "graph", f"the inner backend does not compile it rewritten: {first_line(error)}.")
        ]
        compiled = inner(graph, list(example_inputs))
    return compiled


def _rewritten(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    passes: list[Rewrite] | None,
    where: str | None,
    network: NetworkRewrite | None,
) -> tuple[torch.fx.GraphModule, Report]:
    """The rewritten graph, or the graph itself and why, whatever goes wrong: what a user compiles has to run."""
    try:
        return rewrite_dynamo_graph(graph, example_inputs, passes, where, network)
    except PassError:
        raise
    except Exception as error:
        log.exception("subquad leaves a graph as it is, because of an error of its own")
        reason = f"subquad failed on it ({type(error).__name__}: {first_line(error)}), so it is compiled as it was."
        return graph, refused_whole(graph, reason)


def rewrite_dynamo_graph(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    passes: list[Rewrite] | None,
    where: str | None = None,
    network: NetworkRewrite | None = None,
) -> tuple[torch.fx.GraphModule, Report]:
    """The graph with every site replaced that gets a pass, and the report; the others stay as they are.

    A graph of which nothing is replaced, or whose writes cannot be made values, is returned itself.

    passes: the ones named; None stands for the exact ones that the cost model predicts to pay.  network: the rewrite of
    the whole graph, for which all sites become operators when no other pass is named.
    """
    original = graph
    try:
        graph = canonical_graph(graph)
    except CaptureError as error:
        return original, refused_whole(original, str(error))
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    mark_parameters(placeholders)
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
    sites = [site for site in report.sites if where is None or is_selected(site.path, where)]
    if network is not None and not passes:
        passes = parse_passes("fuse")
    for site, chosen in choose(passes, sites, report):
        emit_site(copied.graph, carry_site(site, mapping), chosen.operator(site), {}, "")
        report.applied.append(applied_entry(site, chosen))
    tidy(copied.graph)
    made = copied.graph
    if network is not None and report.applied:
        split, _ = copy_capture(copied)
        done = network.rewrite(split.graph)
        if isinstance(done, Refusal):
            report.refused.append(done)
        else:
            made = split.graph
            report.applied.append(network_entry(network, done))
    for refusal in (*report.refusals, *report.refused):
        log.info("%s", refusal)
    for kept in report.declined:
        log.info("%s: %s", kept.path or "<root>", kept.reason)
    return made if report.applied else original, report


def canonical_graph(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Dynamo's graph without writes, marked regions, assertions and dead code; the given graph stays as it is.

    Raises CaptureError for a write that has no functional form, and for autocast, under which operators change dtypes.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise CaptureError("the graph runs under autocast, which changes dtypes inside it; convert the model instead.")
    made = vmap_written_out(inlined(flex_written_out(graph), torch.is_grad_enabled()))
    made = functional(autocast_written_out(layers_written_out(made)))
    if made is graph:
        copied = torch.fx.Graph()
        copied.output(copied.graph_copy(graph.graph, {}))
        made = torch.fx.GraphModule(graph, copied)
    read_lifted_numbers(made)
    made_plain(made)
    return made


def mark_parameters(placeholders: list[torch.fx.Node]) -> None:
    """Set meta["parameter"] on the placeholders that are parameters of a module, as attributes are in other dialects."""
    for node in placeholders:
        node.meta["parameter"] = node.type is torch.nn.Parameter


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
