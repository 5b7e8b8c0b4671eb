"""How `subquad inspect` explains what it found: one block per kind of site, refusal and near miss, plain in a pipe."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import click

from subquad.cli.printing import shorten
from subquad.ir.loop import Loop
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report

WIDEST = 110
Field = tuple[str, str]


def explain(report: Report, chosen: dict[str, str]) -> None:
    """Every site with its spelling, mask, operands and decision, then refusals, then the nearest miss.

    chosen: by path, the pass that `rewrite` would apply without being told.
    """
    _title("Attention")
    decisions = {d.path: f"declined by the cost model: {d.reason}" for d in report.declined}
    decisions |= {r.path: f"declined, the contract cannot be kept: {r.reason}" for r in report.refused}
    decisions |= {path: f"`subquad rewrite` replaces it by {name}" for path, name in chosen.items()}
    rows = [({**site.json(), "decision": decisions.get(site.path, "")}, site.path) for site in report.sites]
    for paths, site in grouped(rows):
        _block(f"{_count(len(paths), 'site')}  {shorten(paths) or '<root>'}", site_fields(site))
    if not report.sites:
        click.echo("  none")
    if report.loops:
        _title("Loops")
        for loop in report.loops:
            _block(f"{loop.origin}  {loop.path}", loop_fields(loop))
    if report.prefixes:
        _title("Shared prefixes")
        for paths, prefix in grouped([(prefix.json(), prefix.path) for prefix in report.prefixes]):
            _block(shorten(paths) or "<root>", prefix_fields(prefix))
    located = [refusal for refusal in report.refusals if refusal.path or refusal.source]
    _refusals("Refused", located)
    if report.nearest is not None and (len(located) > 1 or report.nearest not in located):
        _title("Nothing matched; the nearest miss")
        _block(report.nearest.path or "<root>", refusal_fields(report.nearest.json()))


def site_fields(site: dict[str, Any]) -> list[Field]:
    """What is said of one site, name by name."""
    mask, evidence = site["mask"], list(site["evidence"])
    family = mask["family"] if mask.get("family") else mask.get("predicate")
    of_mask = list(mask.get("evidence") or ())
    if of_mask == ["no mask"] and site["biases"]:
        of_mask = ["no mask is proved; what an additive bias hides stays in the bias"]
    spelling = [line.removeprefix("read from the graph: ") for line in evidence if line not in of_mask]
    heads = f"{site['heads']} for queries, {site['kv_heads']} for keys and values, width {site['head_dim']}"
    if site["value_dim"] != site["head_dim"]:
        heads += f" (values {site['value_dim']})"
    extras = [
        f"scale {site['scale']:.4g}",
        "" if site["softcap"] is None else f"softcap {site['softcap']:g}",
        "" if not site["biases"] else _count(site["biases"], "additive bias", "es"),
        "a factor per query" if site["gain"] else "",
        "a sink logit per head" if site["sinks"] else "",
    ]
    fields = [
        ("spelling", f"{'SDPA' if site['origin'] == 'sdpa' else 'softmax'}, {site['phase']}: {'; '.join(spelling)}"),
        ("mask", f"{family}" + (f" — {'; '.join(of_mask)}" if of_mask else "")),
        ("heads", heads),
        ("scores", ", ".join(x for x in extras if x)),
    ]
    provenance = site["provenance"]
    if provenance is not None:
        fields += [(letter, _origin(provenance[letter], site["path"])) for letter in "qkv"]
        shared = "q, k and v are projections of one tensor"
        fields.append(("input", shared if provenance["layer_input"] else f"not found: {provenance['why']}"))
    return [*fields, ("source", site["source"]), ("decision", site["decision"])]


def prefix_fields(prefix: dict[str, Any]) -> list[Field]:
    """Which columns are shared by which rows, and how that is known."""
    columns = "all columns" if prefix["columns"] == "all" else f"the first {prefix['columns']} columns"
    return [("shared", f"{columns}, by {prefix['groups']}"), ("evidence", "; ".join(prefix["evidence"]))]


def _origin(origin: dict[str, Any], path: str) -> str:
    """The way from a projection to an operand; weights are named from the site's module on where they lie in it."""
    if origin["why"]:
        return f"unknown: {origin['why']}"
    parts = []
    for part in origin["parts"]:
        projection = part["projection"]
        steps = [projection["weight"].removeprefix(f"{path}.") if projection else f"unknown ({part['why']})"]
        if part["factor"] != 1.0:
            steps.append(f"times {part['factor']:.4g}")
        if part["norm"]:
            steps.append(f"{part['norm']['name']} norm over {part['norm']['width']}")
        if part["rotary"]:
            steps.append(_rotary(part["rotary"]))
        if part["norm"] and part["norm"]["after_rotary"]:
            steps[1:] = steps[:0:-1]
        where = f"{part['start']}:{part['start'] + part['width']} " if len(origin["parts"]) > 1 else ""
        parts.append(where + " → ".join(steps))
    return "; ".join(parts)


def _rotary(rotary: dict[str, Any]) -> str:
    if rotary["position"] is None:
        return f"rotary {rotary['style']}, position unknown: {rotary['why']}"
    base = "" if rotary["base"] is None else f", θ {rotary['base']:g}"
    scale = "" if rotary["scale"] == 1.0 else f", length {rotary['scale']:.4g}"
    return f"rotary {rotary['style']} at position {rotary['position']}{base}{scale}"


def loop_fields(loop: Loop) -> list[Field]:
    """What is said of one decoding loop, slot by slot; empty slots are left out."""
    slots = [
        ("model", loop.model), ("fed", loop.context), ("window", loop.window), ("cache", loop.cache),
        ("positions", loop.positions), ("row", loop.select), ("write", loop.write), ("bound", loop.bound),
        ("result", loop.result),
    ]  # fmt: skip
    named = [(name, str(slot)) for name, slot in slots if slot.kind != "none"]
    several = [("stops", loop.stop), ("also does", loop.effects)]
    listed = [(name, "; ".join(map(str, found))) for name, found in several if found]
    chosen = [f"{s.name}: {'yes' if s.applies else 'no'}, {s.reason}" for s in loop.schedules]
    return [*named, ("sampler", loop.sampler), *listed, ("schedules", "; ".join(chosen)), ("source", loop.source)]


def refusal_fields(refusal: dict[str, str]) -> list[Field]:
    """What is said of one refusal."""
    where = refusal["source"] + (f"  {refusal['code']}" if refusal["code"] else "")
    return [("why", refusal["reason"]), ("advice", refusal["advice"]), ("source", where)]


def _refusals(title: str, refusals: Sequence[Refusal]) -> None:
    found = grouped([(r.json(), r.path) for r in refusals])
    if not found:
        return
    _title(title)
    for paths, refusal in found:
        name = refusal["what"] if len(paths) == 1 else f"{len(paths)} × {refusal['what']}"
        _block(f"{name}  {shorten([path or '<root>' for path in paths])}", refusal_fields(refusal))


def grouped(rows: Iterable[tuple[dict[str, Any], str]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Rows that say the same, the numbers of their layers aside, in order of first appearance: (paths, the first row)."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for row, path in rows:
        kept = {key: value for key, value in row.items() if key not in ("path", "source", "evidence")}
        if kept.get("provenance"):
            kept["provenance"] = {**kept["provenance"], "layer_input": bool(kept["provenance"]["layer_input"])}
        said = json.dumps(kept, sort_keys=True, default=str).replace(f'"{path}.', '"')
        key = re.sub(r"(?<=[A-Za-z_]\.)\d+", "#", said)
        groups.setdefault(key, ([], row))[0].append(path)
    return list(groups.values())


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"


def _title(title: str) -> None:
    click.echo(click.style(title, bold=True))


def _block(head: str, fields: Sequence[Field]) -> None:
    """A heading and its fields, wrapped between words at the terminal's width; 80 columns in a pipe."""
    width = min(shutil.get_terminal_size((80, 24)).columns, WIDEST)
    click.echo("\n".join(textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="    ", **_WHOLE)))
    margin = 4 + max(len(name) for name, _ in fields) + 2
    for name, text in fields:
        if text:
            first = f"    {name}".ljust(margin)
            lines = textwrap.wrap(
                text, max(width, margin + 20), initial_indent=first, subsequent_indent=" " * margin, **_WHOLE
            )
            click.echo("\n".join(lines))


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
