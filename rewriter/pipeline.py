"""The drivers `inspect`, `rewrite` and `list_passes`: capture, recognise, plan, apply, verify."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any, overload

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from subquad.application import apply_plan, original_forward, restore, rewritten
from subquad.bound_forward import own_hooks, own_hooks_lifted
from subquad.capture import Capture, capture
from subquad.fingerprint import fingerprint
from subquad.ir.contract import Contract
from subquad.ir.cost import declined
from subquad.ir.errors import PlanError, SelectionError, did_you_mean
from subquad.ir.loop_rewrite import LOOP, LoopRewrite, Pass
from subquad.ir.network_rewrite import NETWORK, NetworkRewrite
from subquad.ir.plan import Plan, Step
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report
from subquad.ir.rewrite import Rewrite
from subquad.ir.site import Site
from subquad.loop_program import rewrite_loops
from subquad.model_loops import add_loops, inspect_function
from subquad.pass_spec import make_pass, parse_passes, parse_request
from subquad.passes import discover
from subquad.recognition import recognise
from subquad.speculation_words import planned
from subquad.unrolled_run import loop_module, unbind_loop

Passes = str | Pass | Iterable[str | Pass] | None
EXACT_DEFAULT = ("fuse",)
"""What `rewrite` considers when no pass is named: exact rewrites only, and of those the ones that pay."""
LOSSLESS_DEFAULT = "speculate"
"""What the decoding loop of a model that generates gets when no pass is named."""


@dataclass(frozen=True)
class PassInfo:
    """One available pass: its name, contract, what it matches, its knobs with defaults, and the paper."""

    name: str
    contract: Contract
    matches: str
    knobs: dict[str, Any]
    paper: str

    def json(self) -> dict[str, Any]:
        """The public words of a pass."""
        return {
            "name": self.name,
            "contract": self.contract.value,
            "matches": self.matches,
            "knobs": self.knobs,
            "paper": self.paper,
        }


def list_passes() -> list[PassInfo]:
    """Every pass that exists."""
    return [
        PassInfo(name, kind.contract, kind.matches, {f.name: f.default for f in fields(kind)}, kind.paper)
        for name, kind in discover().items()
    ]


def inspect(model: nn.Module | ExportedProgram | FunctionType, example_inputs: Any = None) -> Report:
    """Find every attention site and decoding loop of a model and every reason why something is none; changes nothing.

    model: nn.Module, ExportedProgram or fx GraphModule, or a function with a decoding loop.
    example_inputs: what its forward takes; may be left out for a Hugging Face text model.
    Raises CaptureError when the forward cannot be captured.
    """
    if isinstance(model, FunctionType):
        return inspect_function(model, example_inputs)
    report = _captured_report(model, example_inputs)[1]
    if isinstance(model, nn.Module):
        add_loops(model, report)
    return report


def _captured_report(model: nn.Module | ExportedProgram, example_inputs: Any) -> tuple[Capture, Report]:
    report = Report()
    start = time.perf_counter()
    if isinstance(model, nn.Module):
        if own_hooks(model):
            report.notes.append(
                "the hooks of the whole model run around its forward and are no part of its graph or decoder"
            )
        with original_forward(model), own_hooks_lifted(model):
            captured = capture(model, example_inputs)
    else:
        captured = capture(model, example_inputs)
    report.seconds["capture"] = time.perf_counter() - start
    return captured, recognise(captured, report)


@overload
def rewrite(model: nn.Module | ExportedProgram, *, passes: Passes = ..., where: str | None = ..., example_inputs: Any = ...,
            plan: Plan | str | None = ..., verify: bool = ...) -> nn.Module: ...  # fmt: skip


@overload
def rewrite(model: None = None, *, passes: Passes = ..., where: str | None = ..., example_inputs: Any = ...,
            plan: Plan | str | None = ..., verify: bool = ...) -> Callable[[type[nn.Module]], type[nn.Module]]: ...  # fmt: skip


def rewrite(
    model: nn.Module | ExportedProgram | type[nn.Module] | FunctionType | None = None,
    *,
    passes: Passes = None,
    where: str | None = None,
    example_inputs: Any = None,
    plan: Plan | str | None = None,
    verify: bool = True,
) -> Any:
    """Rewrite a model in place and return it, or decorate a class whose instances rewrite themselves, or a decoding loop.

    model: nn.Module, ExportedProgram or fx GraphModule; None, a class or a function makes this a decorator.
    passes: one or several written passes ("fuse", "linearize:lolcats(window=64)"); None applies the exact ones wherever the
    cost model predicts a gain at the example inputs' sizes, and lists the other sites in `report.declined`.
    where: a pattern for module paths (`model.layers.*`).  plan: a Plan or its text, instead of passes.
    verify: measure every rewrite against the original and roll back what breaks its contract.  The module keeps its class,
    parameter objects and names; its `report` attribute tells what was done.
    Raises PassError, SelectionError, PlanError or CaptureError for a user's mistake; then nothing was changed.
    """
    if model is None or isinstance(model, (type, FunctionType)):
        from subquad.decoration import decorate

        return decorate(model, passes=passes, where=where, verify=verify)
    if plan is not None and (passes is not None or where is not None):
        raise PlanError("give either a plan, or passes and a pattern, not both.")
    chosen, loop, network = (None, None, None) if passes is None else parse_request(passes)
    parsed = Plan.parse(plan) if isinstance(plan, str) else plan
    if isinstance(model, nn.Module) and rewritten(model) is not None:
        restore(model)
    if parsed is not None and isinstance(model, nn.Module) and parsed.model != fingerprint(model):
        raise PlanError(
            f"the plan was made for another model: it has fingerprint {parsed.model}, this one {fingerprint(model)}."
        )
    if isinstance(model, GraphModule) and plan is None and where is None and not chosen:
        unbind_loop(model)
        if (looping := loop_module(model, loop)) is not None:
            return looping
    captured, report = _captured_report(model, example_inputs)
    inside = loop if parsed is None else planned(parsed)
    if inside is not None and (drafting := rewrite_loops(captured, report, inside)) is not None:
        return drafting
    if parsed is not None:
        steps, loop, network = planned_steps(parsed, report.sites), planned(parsed), planned_network(parsed)
    else:
        steps = choose(parse_passes(EXACT_DEFAULT) if chosen == [] else chosen, selected_sites(report, where), report)
        loop = chosen_loop(captured.root, loop, passes is None and len(steps) == len(report.sites), report)
    return carry_out(captured, report, steps, verify, loop, network)


def carry_out(
    captured: Capture, report: Report, steps: list[tuple[Site, Rewrite]], verify: bool, loop: LoopRewrite | None = None,
    network: NetworkRewrite | None = None,
) -> nn.Module:  # fmt: skip
    """Apply chosen steps to a capture's root, verify them, and roll back what breaks its contract."""
    start = time.perf_counter()
    root = _apply(captured, report, steps, loop, network)
    report.seconds["apply"] = time.perf_counter() - start
    if verify and steps:
        from subquad.verification import failed_steps

        start = time.perf_counter()
        broken = failed_steps(root)
        if network is not None and broken and all(one.passed for one in report.verification if one.rung == "site"):
            broken = [Refusal(NETWORK, "verification", broken[0].reason)]
            network = None
        report.seconds["verify"] = time.perf_counter() - start
        if broken:
            report.rolled_back.extend(broken)
            paths = {refusal.path for refusal in broken}
            restore(root)
            root = _apply(captured, report, [(s, r) for s, r in steps if s.path not in paths], loop, network)
    record = rewritten(root)
    if record is not None and record.bound:
        report.notes.append(_bound_note(list(record.bound)))
    return root


def _bound_note(paths: list[str]) -> str:
    """Which forwards run rewritten graphs; everything around them still runs as the user's own code."""
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return "forward rebound: " + ", ".join(path or "the whole model" for path in paths[:4]) + more


def _apply(
    captured: Capture, report: Report, steps: list[tuple[Site, Rewrite]], loop: LoopRewrite | None,
    network: NetworkRewrite | None,
) -> nn.Module:  # fmt: skip
    named: list[tuple[str, Pass]] = [(site.path, step) for site, step in steps]
    named += [(LOOP, loop)] if loop is not None else []
    named += [(NETWORK, network)] if network is not None else []
    plan = Plan(
        tuple(Step(path, step.name, tuple(sorted(step.knobs().items()))) for path, step in named),
        fingerprint(captured.root),
    )
    report.plan = plan
    report.applied = [applied_entry(site, step) for site, step in steps]
    if loop is not None:
        report.applied.append({"path": LOOP, "pass": str(loop), "contract": loop.contract.value, "mask": ""})
    return apply_plan(captured, steps, plan, report, loop, network)


def chosen_loop(root: nn.Module, named: LoopRewrite | None, by_default: bool, report: Report) -> LoopRewrite | None:
    """The rewrite of a model's decoding loop: the one that was named, or the default one; None where the model has no loop.

    A named one for a model that does not generate is refused in the report.
    """
    can = getattr(root, "can_generate", None)
    generates = hasattr(root, "generate") and can is not None and bool(can())
    if named is not None and not generates:
        reason = f"{type(root).__name__} has no decoding loop of its own (no generate method)."
        report.refused.append(Refusal(LOOP, named.name, reason))
        return None
    if named is None and by_default and generates:
        return make_pass(LOSSLESS_DEFAULT, {})  # type: ignore[return-value]
    return named


def applied_entry(site: Site, step: Rewrite) -> dict[str, Any]:
    """The report's words for one rewrite of one site."""
    return {"path": site.path, "pass": str(step), "contract": step.contract.value, "mask": site.mask.family}


def selected_sites(report: Report, where: str | None) -> list[Site]:
    """The report's sites that match `where`, all of them when it is None.

    Raises SelectionError when `where` matches no site, or when the model has none.
    """
    if not report.sites:
        reasons = "; ".join(dict.fromkeys(str(refusal) for refusal in report.refusals[:3]))
        raise SelectionError(f"no attention was found, so there is nothing to rewrite: {reasons}")
    selected = [site for site in report.sites if where is None or is_selected(site.path, where)]
    if not selected:
        raise SelectionError(
            f"the pattern {where!r} matches no attention site; {did_you_mean(where or '', [s.path for s in report.sites[:6]])}"
        )
    return selected


def choose(chosen: list[Rewrite] | None, sites: list[Site], report: Report) -> list[tuple[Site, Rewrite]]:
    """The rewrite each site gets, if any: of the passes the user named, or, for None, of the exact ones that pay.

    A named pass is never declined.  The reasons why a site gets none go to the report.
    """
    if chosen is not None:
        return _admitted(chosen, sites, report)
    return _paying(_admitted(parse_passes(EXACT_DEFAULT), sites, report), report)


def _admitted(chosen: list[Rewrite], sites: list[Site], report: Report) -> list[tuple[Site, Rewrite]]:
    """Every site with the first pass that admits it; the refusals of a site that none admits go to the report."""
    steps: list[tuple[Site, Rewrite]] = []
    for site in sites:
        refusals: list[Refusal] = []
        for candidate in chosen:
            refusal = candidate.admits(site)
            if refusal is None:
                steps.append((site, candidate))
                break
            refusals.append(refusal)
        else:
            report.refused.extend(refusals)
    return steps


def _paying(steps: list[tuple[Site, Rewrite]], report: Report) -> list[tuple[Site, Rewrite]]:
    """The steps that the cost model predicts to gain time; the others go to the report as declined."""
    verdicts = [(step, declined(step[0], str(step[1]), step[1].cost(step[0]))) for step in steps]
    report.declined.extend(verdict for _, verdict in verdicts if verdict is not None)
    return [step for step, verdict in verdicts if verdict is None]


def is_selected(path: str, pattern: str) -> bool:
    """True when a site's path, or a module above it, matches the pattern (`*` crosses dots)."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern.rstrip(".") + ".*")


def planned_network(plan: Plan) -> NetworkRewrite | None:
    """The rewrite of the whole network that a plan holds, None when it holds none."""
    for step in plan.steps:
        if step.path == NETWORK:
            made = make_pass(step.rewrite, dict(step.knobs))
            assert isinstance(made, NetworkRewrite)
            return made
    return None


def planned_steps(plan: Plan, sites: list[Site]) -> list[tuple[Site, Rewrite]]:
    """The steps of a plan on a model's sites; raises PlanError for a site that the model lacks or does not admit."""
    by_path = {site.path: site for site in sites}
    steps = []
    for step in plan.steps:
        if step.path in (LOOP, NETWORK):
            continue
        site = by_path.get(step.path)
        if site is None:
            raise PlanError(f"the plan names the site {step.path!r}; {did_you_mean(step.path, by_path)}")
        made = make_pass(step.rewrite, dict(step.knobs))
        assert isinstance(made, Rewrite)
        refusal = made.admits(site)
        if refusal is not None:
            raise PlanError(f"the plan's {step.rewrite!r} does not fit: {refusal}")
        steps.append((site, made))
    return steps
