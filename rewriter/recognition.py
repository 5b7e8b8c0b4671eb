"""Run every recogniser on a capture."""

from __future__ import annotations

import time

import torch
import torch.fx

from subquad.capture import Capture
from subquad.ir.graph import attribute, module_path, source_of
from subquad.ir.refusal import Refusal, refuse
from subquad.ir.report import Report
from subquad.ir.vocabulary import kind
from subquad.passes.canonicalize.flex_attention import is_flex
from subquad.passes.canonicalize.torch_layers import is_layer
from subquad.passes.recognize.attention import find_attention
from subquad.passes.recognize.loop_carried import find_while_loops
from subquad.passes.recognize.loop_unrolled import Unrolled, find_unrolled
from subquad.passes.recognize.near_miss import nearest_miss
from subquad.passes.recognize.normalisation import read_softmax
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.share_prefix.find_prefixes import find_prefixes


def recognise(capture: Capture, report: Report) -> Report:
    """Add the capture's sites and refusals to the report, with the time it took."""
    start = time.perf_counter()
    tensors = {
        node: capture.known_tensors[node.name]
        for node in capture.graph.graph.nodes
        if node.name in capture.known_tensors
    }
    sites, refusals = find_attention(capture.graph, tensors, capture.example)
    report.notes.extend(note for note in capture.notes if note not in report.notes)
    report.sites.extend(sites)
    report.refusals.extend([*refusals, *_unread(capture.graph)])
    _add_loops(capture.graph, report)
    if not sites:
        report.nearest = nearest_miss(capture.graph.graph, report.refusals)
    if not sites and not report.refusals:
        report.refusals.append(
            Refusal(
                "",
                "attention",
                "the graph holds no softmax and no scaled_dot_product_attention, so there is no attention.",
            )
        )
    report.seconds["recognise"] = time.perf_counter() - start
    start = time.perf_counter()
    report.prefixes.extend(find_prefixes(capture.graph, sites))
    report.seconds["prefixes"] = time.perf_counter() - start
    return report


def refused_whole(module: torch.fx.GraphModule, reason: str) -> Report:
    """A refusal of a graph that stays as it is, and one for each softmax and attention call in it.

    reason: a sentence that says why.
    """
    refusals = [Refusal("", "graph", reason)]
    for node in module.graph.nodes:
        what = _anchored(node)
        if what is not None:
            refusals.append(refuse(node, what, f"it stands in a graph that stays as it is: {reason}"))
    return Report(refusals=refusals)


def _anchored(node: torch.fx.Node) -> str | None:
    """What a node is of a graph that may be in any state: "attention", "softmax" or None for neither."""
    try:
        if kind(node) == "sdpa" or is_flex(node) or is_layer(node):
            return "attention"
        return None if read_softmax(node) is None else "softmax"
    except NotAttention:
        return "softmax"
    except Exception:
        return None


def _add_loops(module: torch.fx.GraphModule, report: Report) -> None:
    """Add the decoding loops that the graph holds, unrolled or as a while_loop, and what keeps others from being one."""
    for found in (*find_while_loops(module), *find_unrolled(module.graph)):
        if isinstance(found, Refusal):
            report.refusals.append(found)
        else:
            report.loops.append(found.loop if isinstance(found, Unrolled) else found)


def _unread(module: torch.fx.GraphModule) -> list[Refusal]:
    """A refusal for every higher-order operator whose regions hold a softmax or an SDPA call."""
    refusals = []
    for node in module.graph.nodes:
        for region in node.args if isinstance(node.target, torch._ops.HigherOrderOperator) else ():
            if isinstance(region, torch.fx.Node) and region.op == "get_attr" and _attends(module, str(region.target)):
                reason = f"it stands inside a region of `{node.target.__name__}`, which stays as it is."
                refusals.append(Refusal(module_path(node), "attention", reason, source_of(node)))
    return refusals


def _attends(module: torch.fx.GraphModule, name: str) -> bool:
    region = attribute(module, name)
    if not isinstance(region, torch.fx.GraphModule):
        return False
    return any(kind(node) in ("softmax", "softmax_core", "sdpa") for node in region.graph.nodes)
