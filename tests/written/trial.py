"""Capture a written model in one dialect, compare what is found with what must be, rewrite it and compare its outputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from subquad.backend import rewrite_dynamo_graph
from subquad.capture import capture
from subquad.ir.report import Report
from subquad.pass_spec import parse_passes
from subquad.pipeline import carry_out, choose
from subquad.recognition import recognise
from written.case import Case
from written.judge import assert_within_contract

Run = Callable[..., Any]


def check(case: Case, dialect: str) -> None:
    """Raise AssertionError when recognition or the rewritten model is not what the case says."""
    model = case.model()
    if dialect == "dynamo":
        report, run = _dynamo(case, model)
    elif dialect == "core":
        report, run = _rewritten(_decomposed(case, model), case, verify=False)
    else:
        report, run = _rewritten(model, case, verify=dialect == "verified")
    plain, judge = case.model(), case.model()
    for (name, kept), fresh in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert dialect == "dynamo" or torch.equal(kept, fresh), f"the rewrite changed the buffer {name}"
    for size in range(len(case.sizes)):
        assert_within_contract(run, plain, judge, case.call(size))
    assert_found(case, report)
    applied = [entry["path"] for entry in report.applied]
    assert not report.rolled_back, f"rolled back: {report.rolled_back[0]}"
    assert len(applied) == len(case.sites), f"{len(applied)} of {len(case.sites)} sites rewritten"


def assert_found(case: Case, report: Report) -> None:
    """The sites and refusals of a report are those of the case."""
    reasons = [refusal.reason for refusal in report.refusals]
    assert len(report.sites) == len(case.sites), f"{len(report.sites)} of {len(case.sites)} sites; refused: {reasons}"
    for site, words in zip(report.sites, case.sites, strict=True):
        found = site.json() | {"mask": site.mask.family, "empty_rows": site.mask.empty_rows}
        for word, wanted in words.items():
            value = found[word]
            if word == "mask":
                value, wanted = _unnamed(value), _unnamed(wanted)
            if isinstance(wanted, float):
                assert value == pytest.approx(wanted, rel=1e-5), f"{word} is {value}, not {wanted}"
            else:
                assert value == wanted, f"{word} is {value!r}, not {wanted!r}"
    if case.sites and not case.refused:
        assert not reasons, f"refused: {reasons}"
        return
    left = list(reasons)
    for part in case.refused:
        match = next((reason for reason in left if part in reason), None)
        assert match is not None, f"no refusal says {part!r}: {reasons}"
        left.remove(match)
    assert not left, f"refused besides: {left}"


def _unnamed(family: str) -> str:
    """A mask's family as all dialects name it: Dynamo's inputs are `l_name_`, computed tables bear a node's name."""
    family = re.sub(r"\bl_(\w+?)_(?=\W|$)", r"\1", family)
    return re.sub(r"\w+ of ", "", family)


def _rewritten(model: nn.Module | ExportedProgram, case: Case, verify: bool) -> tuple[Report, Run]:
    """Captured once, every site fused; a model without sites runs as it is."""
    captured = capture(model, case.call())
    report = recognise(captured, Report())
    fast = carry_out(captured, report, choose(parse_passes("fuse"), report.sites, report), verify)
    return report, fast


def _decomposed(case: Case, model: nn.Module) -> ExportedProgram:
    inputs = case.call()
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    with torch.no_grad(), ExitStack() as left:
        left.callback(torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth, depth)  # what a failed vmap leaves
        shapes = [_symbolic(*values) for values in zip(inputs, case.call(1), strict=True)]
        named = inspect.signature(model.forward).bind(*shapes).arguments
        return torch.export.export(model, inputs, dynamic_shapes=dict(named), strict=False).run_decompositions()


def _symbolic(one: Any, other: Any) -> Any:
    """The axes of an input that differ between two calls."""
    if not isinstance(one, torch.Tensor):
        return None
    return {axis: Dim.AUTO for axis, (m, n) in enumerate(zip(one.shape, other.shape, strict=True)) if m != n}


def _dynamo(case: Case, model: nn.Module) -> tuple[Report, Run]:
    """What `torch.compile` gives: one report of all graphs of the first size, and the compiled module."""
    graphs: list[Report] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Run:
        rewritten, report = rewrite_dynamo_graph(graph, inputs, parse_passes("fuse"))
        graphs.append(report)
        return rewritten.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(*case.call())
    whole = Report()
    for report in graphs:
        whole.sites += report.sites
        whole.applied += report.applied
        whole.refusals += report.refusals
    nothing = [refusal for refusal in whole.refusals if refusal.what == "attention" and not refusal.source]
    if whole.sites or len(whole.refusals) > len(nothing):
        whole.refusals = [refusal for refusal in whole.refusals if refusal not in nothing]
    else:
        whole.refusals = nothing[:1]
    return whole, compiled
