"""One architecture through the compiler: what ran, what was recognised or refused, and whether the rewritten model is right."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from attention_witness import AttentionWitness
from softmax_counter import short, unread
from zoo import NotRewritten, Specimen, call
from zoo_dialects import differences, refusal_words, site_words, through_core_aten, through_dynamo
from zoo_inputs import inputs_of
from zoo_judge import Reference, floating, outputs
from zoo_table import is_no_attention

from subquad.application import restore
from subquad.capture import capture
from subquad.ir.report import Report
from subquad.pass_spec import parse_passes
from subquad.pipeline import carry_out, choose
from subquad.recognition import recognise


@dataclass
class Path:
    """What one way into the compiler showed: export, Dynamo or core ATen.

    sites: the words of each recognised site.  refusals: reason and source of each softmax that is none.  failed: what was
    raised, in which stage.  wrong: cases that broke the contract.  odd: differences to the sites that export showed.
    original: why the forward ran as it was in some of the cases, which the graph does not hold for.  false: sites at lines
    whose softmax was no attention when it ran.  denied: refusals that call a softmax no attention which was one.  helped: why
    torch alone makes no core-ATen program of the model.
    """

    tried: bool = False
    sites: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    not_rewritten: list[str] = field(default_factory=list)
    failed: str = ""
    stage: str = ""
    trace: str = ""
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    original: list[str] = field(default_factory=list)
    false: list[str] = field(default_factory=list)
    denied: list[str] = field(default_factory=list)
    helped: list[str] = field(default_factory=list)
    graphs: int = 1


@dataclass
class Outcome:
    """What happened to one architecture in one spelling; plain data.

    executed: softmaxes and attention calls at run time, of which `attention` by the witness; `lines` counts them by source line and `verdicts` by every line on the
    stack and what the witness calls them; `unread` of them reach no output and are in no graph (looked for when some are missing).  seconds: of processor time by
    stage.  fused: attentions that Inductor's own patterns fuse, None when it was not asked or failed.
    """

    name: str
    spelling: str
    executed: int = 0
    attention: int = 0
    lines: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)
    export: Path = field(default_factory=Path)
    dynamo: Path = field(default_factory=Path)
    core: Path = field(default_factory=Path)
    fused: int | None = None
    unread: int = 0
    nodes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    stage: str = ""

    def silent(self, path: Path) -> int:
        """Executed softmaxes that a way into the compiler does not account for, unless it failed."""
        return (
            0
            if path.failed and not path.sites
            else max(0, self.executed - self.unread - len(path.sites) - len(path.refusals))
        )

    def json(self) -> dict[str, Any]:
        """All fields as plain data."""
        return asdict(self)


def run(specimen: Specimen, ways: Sequence[str] = ("rewrite", "dynamo", "core")) -> Outcome:
    """Export, recognise, rewrite with `fuse` and compare; then the sites of Dynamo's graphs and of the core-ATen program.

    ways: which of these to go beyond recognition.  Whatever is raised is recorded.
    """
    entry = specimen.architecture
    outcome = Outcome(entry.name, specimen.spelling)
    inputs = inputs_of(specimen.model, entry.kind)
    with AttentionWitness(specimen.model).given(inputs.values()) as witness, torch.no_grad():
        call(specimen.model, inputs)
    outcome.executed = witness.executed
    outcome.attention = sum(seen.verdict == "attention" for seen in witness.seen)
    outcome.lines = {f"{what} {short(line)}": n for (what, line), n in witness.lines.items()}
    outcome.verdicts = {f"{verdict} {short(line)}": n for (line, verdict), n in witness.verdicts().items()}
    if not outcome.executed:
        return outcome
    reference = None
    if "rewrite" in ways or "dynamo" in ways:
        with _stage(outcome, "original"):
            reference = Reference(specimen.model, entry.kind)
    compared = reference if "rewrite" in ways else None
    _guarded(outcome, outcome.export, lambda: _through_export(specimen, compared, inputs, outcome))
    if "dynamo" in ways and reference is not None:
        _guarded(outcome, outcome.dynamo, lambda: _through_dynamo(specimen, reference, inputs, outcome))
    if "core" in ways:
        _guarded(outcome, outcome.core, lambda: _through_core_aten(specimen, inputs, outcome))
    for path in (outcome.export, outcome.dynamo, outcome.core):
        judge_lines(outcome, path)
    return outcome


def judge_lines(outcome: Outcome, path: Path) -> None:
    """Sites and refusals of a way beside what the witness said: of a site's source line, and of the forward as a whole."""

    def counted(*verdicts: str) -> Counter[str]:
        lines: Counter[str] = Counter()
        for word, n in outcome.verdicts.items():
            verdict, _, line = word.partition(" ")
            lines[line] += n if verdict in verdicts else 0
        return lines

    sites = Counter(site["source"] for site in path.sites)
    path.false = [f"{line} ({n})" for line, n in (sites - counted("attention", "learned")).items()]
    denying = sum(is_no_attention(reason) for reason, _ in path.refusals)
    others = outcome.executed - outcome.attention
    path.denied = [f"{denying} denied, {others} were no attention ({denying - others})"] if denying > others else []


def _guarded(outcome: Outcome, path: Path, work: Callable[[], None]) -> None:
    """Do the work of one way into the compiler; what it raises stays with that way."""
    path.tried = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except Exception as error:
        path.failed = f"{type(error).__name__}: {str(error).strip()[:400]}"
        path.stage = outcome.stage
        path.trace = "".join(traceback.format_exception(error)[-8:])[-1800:]


def _through_export(specimen: Specimen, reference: Reference | None, inputs: dict[str, Any], outcome: Outcome) -> None:
    model, kind, path = specimen.model, specimen.architecture.kind, outcome.export
    with _stage(outcome, "capture"), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        captured = capture(model, inputs)
    with _stage(outcome, "recognise"):
        report = recognise(captured, Report())
    path.sites = [site_words(site) for site in report.sites]
    path.refusals = refusal_words(report)
    if len(path.sites) + len(path.refusals) < outcome.executed:
        with torch.no_grad():
            outcome.unread = unread(lambda: floating(call(model, inputs)))
    outcome.nodes = len(captured.graph.graph.nodes)
    if not report.sites or reference is None:
        return
    with _stage(outcome, "rewrite"), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        steps = choose(parse_passes("fuse"), report.sites, report)
        path.not_rewritten = [f"{r.path}: {r.reason}" for r in report.refused]
        carry_out(captured, report, steps, verify=False)
    try:
        with _stage(outcome, "compare"):
            for case in reference.cases:
                try:
                    said = reference.broken(case, outputs(model, kind, case))
                except NotRewritten as unused:
                    path.original.append(f"size {case[0]}, padding {case[1]}: {unused}")
                    continue
                if said:
                    path.wrong.append(f"size {case[0]}, padding {case[1]}: {said}")
    finally:
        restore(model)
    with _stage(outcome, "restore"):
        if reference.broken(reference.cases[0], outputs(model, kind, reference.cases[0])):
            path.wrong.append("restore does not give back the original")


def _through_dynamo(specimen: Specimen, reference: Reference, inputs: dict[str, Any], outcome: Outcome) -> None:
    path = outcome.dynamo
    with _stage(outcome, "dynamo"):
        found = through_dynamo(specimen.model, inputs)
    path.refusals, path.graphs = found.refusals, found.graphs
    path.sites = [site_words(site) for site in found.sites]
    said = reference.broken(reference.cases[0], floating(found.output))
    path.wrong = [said] if said else []
    path.odd = differences(outcome.export.sites, path.sites, path.graphs == 1) if not outcome.export.failed else []


def _through_core_aten(specimen: Specimen, inputs: dict[str, Any], outcome: Outcome) -> None:
    path = outcome.core
    with _stage(outcome, "core"):
        found = through_core_aten(specimen.model, inputs)
    path.sites, path.refusals, path.helped = [site_words(site) for site in found.sites], found.refusals, found.helped
    path.odd = differences(outcome.export.sites, path.sites) if not outcome.export.failed else []


class _stage:
    """Records the processor time of a stage, and which stage raised."""

    def __init__(self, outcome: Outcome, name: str) -> None:
        self.outcome, self.name = outcome, name

    def __enter__(self) -> None:
        self.start = time.process_time()
        self.outcome.stage = self.name

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.outcome.seconds[self.name] = round(time.process_time() - self.start, 3)
        if kind is None:
            self.outcome.stage = ""
