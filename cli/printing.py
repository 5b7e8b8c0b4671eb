"""How reports look on a terminal and in a pipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from subquad.ir.cost import Declined
from subquad.ir.refusal import Refusal
from subquad.ir.report import Measurement, Report

if TYPE_CHECKING:
    from subquad.demonstration import Stage
    from subquad.kernel_emission import EmittedKernel
    from subquad.speed import Comparison


class _Console(Console):
    """A console that leaves a broken pipe to the caller, which ends with the shell's own status for it."""

    def on_broken_pipe(self) -> None:
        """Raise the error that rich would turn into exit status 1."""
        raise BrokenPipeError


def console() -> Console:
    """The console on stdout; in a pipe lines are wide and plain."""
    return _Console() if sys.stdout.isatty() else _Console(width=180, no_color=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object; NaN and infinities become null, so that every reader takes it."""
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table, or nothing when it has no rows; columns whose name begins with # are numbers."""
    kept = [[escape(str(cell)) for cell in row] for row in rows]
    if not kept:
        return
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE)
    for column in columns:
        table.add_column(column.lstrip("#"), justify="right" if column.startswith("#") else "left", overflow="fold")
    for row in kept:
        table.add_row(*row)
    console().print(table)


def print_sites(report: Report) -> None:
    """Sites in a table, equal layers in one row, then loops and prefixes."""
    rows = []
    for paths, site in _equal([(s.path, {k: v for k, v in s.json().items() if k != "path"}) for s in report.sites]):
        mask = site["mask"]
        shown = mask.get("family") or mask.get("predicate") if isinstance(mask, dict) else mask
        extras = [f"softcap {site['softcap']}"] if site["softcap"] is not None else []
        extras += [f"{site['biases']} bias"] if site["biases"] else []
        extras += ["sinks"] if site["sinks"] else []
        heads = f"{site['heads']} / {site['kv_heads']}"
        rows.append(
            [len(paths), shorten(paths), site["origin"], site["phase"], shown, f"{site['scale']:.4g}", heads,
             site["head_dim"], ", ".join(extras)]
        )  # fmt: skip
    columns = ["#sites", "path", "origin", "phase", "mask", "#scale", "#heads / KV", "#dim", "also"]
    print_table("Attention", columns, rows)
    loops = [
        [x.path or "<root>", x.origin, ", ".join(x.state), x.sampler, ", ".join(map(str, x.stop))] for x in report.loops
    ]
    print_table("Loops", ["path", "origin", "state", "sampler", "stop"], loops)
    print_table("Prefixes", ["path", "columns", "groups"],
                [[x.path or "<root>", x.columns, x.groups] for x in report.prefixes])  # fmt: skip


def print_refusals(title: str, refusals: Sequence[Refusal]) -> None:
    """Refusals with their reasons, equal ones in one row."""
    equal = _equal([(r.path or "<root>", {"what": r.what, "reason": r.reason, "source": r.source}) for r in refusals])
    print_table(
        title,
        ["#sites", "path", "what", "reason", "source"],
        [[len(paths), shorten(paths), value["what"], value["reason"], value["source"]] for paths, value in equal],
    )


def print_applied(report: Report) -> None:
    """What a rewrite did, did not do, and took back."""
    equal = _equal([(str(a.get("path", "")), {k: v for k, v in a.items() if k != "path"}) for a in report.applied])
    rows = [
        [len(paths), shorten(paths), value.get("pass") or value.get("rewrite", ""), value.get("contract", "")]
        for paths, value in equal
    ]
    print_table("Rewritten", ["#sites", "path", "pass", "contract"], rows)
    print_refusals("Not rewritten", report.refused)
    _print_declined(report.declined)
    print_refusals("Rolled back", report.rolled_back)


def _print_declined(sites: Sequence[Declined]) -> None:
    """Sites that keep their own form, with both predicted times."""
    equal = _equal([(s.path or "<root>", {k: v for k, v in s.json().items() if k != "path"}) for s in sites])
    rows = [
        [
            len(paths), shorten(paths), value["rewrite"], f"{value['predicted']['original_seconds']:.3g}",
            f"{value['predicted']['rewritten_seconds']:.3g}", value["reason"],
        ]
        for paths, value in equal
    ]  # fmt: skip
    print_table("Declined by the cost model", ["#sites", "path", "pass", "#s as it is", "#s with it", "reason"], rows)


def print_verification(measurements: Sequence[Measurement]) -> None:
    """The rungs of the ladder; rungs with one row per site show their worst."""
    rows = []
    for rung in dict.fromkeys((m.rung, m.path == "") for m in measurements):
        group = [m for m in measurements if (m.rung, m.path == "") == rung]
        worst = max(group, key=lambda m: (not m.passed, m.error / m.allowed if m.allowed else m.error))
        allowed = "measured only" if worst.allowed is None else f"{worst.allowed:.3g}"
        where = shorten([m.path for m in group]) or "whole model"
        verdict = "passed" if all(m.passed for m in group) else "FAILED"
        rows.append([worst.rung, where, f"{worst.error:.3g}", allowed, verdict, worst.detail])
    print_table("Verification", ["rung", "where", "#worst error", "#allowed", "verdict", "tried"], rows)


def print_notes(report: Report) -> None:
    """Notes, stage times and the plan's hash, one line each."""
    out = console()
    for note in report.notes:
        out.print(f"note: {note}", markup=False)
    if report.seconds:
        out.print("seconds: " + ", ".join(f"{key} {value:.2f}" for key, value in report.seconds.items()), markup=False)
    if report.plan_hash is not None:
        out.print(f"plan {report.plan_hash}", markup=False)


def _equal(items: list[tuple[str, dict[str, Any]]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Group items whose values are equal, evidence and source aside, in order of first appearance."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for path, value in items:
        key = json.dumps(
            {k: v for k, v in value.items() if k not in ("evidence", "source")}, sort_keys=True, default=str
        )
        key = re.sub(r"layers?\.\d+", "layer.#", key)
        groups.setdefault(key, ([], value))[0].append(path)
    return list(groups.values())


def shorten(paths: Sequence[str]) -> str:
    """`model.layers.0.attn, model.layers.1.attn, …` written as `model.layers.0-29.attn`."""
    if len(paths) < 2:
        return "".join(paths)
    numbers = [re.findall(r"\d+", path) for path in paths]
    bare = {re.sub(r"\d+", "#", path) for path in paths}
    if len(bare) == 1:
        varying = [n for n in range(len(numbers[0])) if len({found[n] for found in numbers}) > 1]
        if len(varying) == 1:
            values = sorted(int(found[varying[0]]) for found in numbers)
            whole = values == list(range(values[0], values[-1] + 1))
            text = f"{values[0]}-{values[-1]}" if whole else ",".join(map(str, values))
            parts = iter(text if n == varying[0] else found for n, found in enumerate(numbers[0]))
            return re.sub(r"\d+", lambda _: next(parts), paths[0])
    return ", ".join(paths[:4]) + (f", … {len(paths) - 4} more" if len(paths) > 4 else "")


def print_figures(comparison: Comparison) -> None:
    """Figures of a comparison as ratios, the machine named."""
    rows = [
        [f.what, f"{f.original:.4g} {f.unit}", f"{f.rewritten:.4g} {f.unit}", f"{f.ratio:.2f}×"]
        for f in comparison.figures
    ]
    title = f"{comparison.machine}; median of {comparison.pairs}"
    print_table(title, ["what", "#original", "#rewritten", "#faster by"], rows)
    for note in comparison.notes:
        console().print(f"note: {note}", markup=False)


def print_stage(stage: Stage) -> None:
    """One stage of the demonstration."""
    out = console()
    out.print(f"\n[bold]{escape(stage.name)}[/bold]: {escape(stage.title)} ({stage.seconds:.1f} s)", highlight=False)
    if stage.report is not None:
        if stage.name == "inspect":
            print_sites(stage.report)
            print_refusals("Refused", stage.report.refusals)
        if stage.report.applied and stage.name != "verify":
            print_applied(stage.report)
        if stage.name == "verify":
            print_verification(stage.report.verification)
    for name, text in stage.texts.items():
        out.print(f"  {name}: {text.strip()}", markup=False, highlight=False)
    rows = [
        [f.what, f"{f.original:.4g} {f.unit}", f"{f.rewritten:.4g} {f.unit}", f"{f.ratio:.2f}×"] for f in stage.figures
    ]
    print_table("", ["what", "#original", "#rewritten", "#faster by"], rows)
    for name, fact in stage.facts.items():
        if fact not in (None, [], ""):
            out.print(f"  {name}: {fact}", markup=False, highlight=False)


def print_kernels(directory: str, kernels: Sequence[EmittedKernel]) -> None:
    """Emitted kernels with what each build uses of its target."""
    rows = []
    for kernel in kernels:
        made = kernel.built
        used = ("source only", "", "", "", "") if made is None else (
            kernel.spec.target, f"{made.shared_bytes} of {made.limit_bytes}", made.registers, made.spills, f"{made.seconds:.1f}"
        )  # fmt: skip
        rows.append([kernel.source, len(kernel.sites), *used, kernel.json()["around"]])
    columns = ["source", "#sites", "target", "#shared bytes", "#registers", "#spills", "#seconds", "on load and store"]
    print_table(directory, columns, rows)


def print_conversion(report: Report) -> None:
    """Perplexity and KL to the original on held-out text before training and after each stage."""
    keys = ("perplexity", "original_perplexity", "merged_perplexity", "kl")
    rows = [
        [entry.get("stage", ""), entry.get("tokens", ""), *(_number(entry.get(key)) for key in keys)]
        for entry in report.conversion
        if "guessed" not in entry
    ]
    for entry in report.conversion:
        if "guessed" in entry:
            shares = ", ".join(f"{share:.0%}" for share in entry["guessed"])
            print(
                f"{entry['stage']}: trained on {entry['tokens']} tokens in {entry['seconds']:.0f} s; of held-out tokens 1, 2, "
                f"… places behind the pending one it guesses {shares}"
            )
    if not rows:
        return
    columns = ["stage", "#tokens", "#perplexity", "#of the original", "#after merging", "#KL to it (nats)"]
    print_table("Conversion, on held-out text", columns, rows)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else ""
