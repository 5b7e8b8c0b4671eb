"""Sums over the outcomes of the zoo, as Markdown: what ran, what was recognised, refused, missed, wrong, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

NOT_ATTENTION = ("a router, pooling or classifier",)
"""Phrases of the refusals that say that a softmax is no attention at all."""


def is_no_attention(reason: str) -> bool:
    """True for a refusal that says that the softmax is no attention at all."""
    return any(phrase in reason for phrase in NOT_ATTENTION)


@dataclass
class Row:
    """One way into the compiler, summed over the architectures whose forward executes a softmax.

    architectures: how many were tried this way.  executed: softmaxes and attention calls at run time.  The executed ones
    are recognised, no attention by the witness (others: routers, poolings, classifiers), refused attention, dead (they reach
    no output), silently missed, or in an architecture that failed before recognition.  wrong, unused, odd, bound: architectures with a broken contract, with a rewritten forward that
    raised, with other sites than export's, and with one that holds for a part of the sizes tried.  false, denied: sites
    whose softmax was no attention when it ran, and refusals that call one no attention which was.
    """

    name: str
    architectures: int = 0
    executed: int = 0
    recognised: int = 0
    others: int = 0
    refused: int = 0
    dead: int = 0
    silent: int = 0
    failed: int = 0
    failed_architectures: int = 0
    wrong: int = 0
    unused: int = 0
    odd: int = 0
    bound: int = 0
    false: int = 0
    denied: int = 0
    causes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def attention(self) -> int:
        """Executed ones that are attention, and reach an output."""
        return self.executed - self.others - self.dead

    def add(self, record: dict[str, Any], way: str) -> None:
        """Count one outcome, a dict as the runner gives it."""
        path = record[way]
        if not path["tried"]:
            return
        name, executed, sites = record["name"], record["executed"], path["sites"]
        self.architectures += 1
        self.executed += executed
        if path["failed"] and not sites and not path["refusals"]:
            self.failed += executed
            self.failed_architectures += 1
            self.causes[f"failed in {path['stage']}: {gist(path['failed'])}"].append(name)
            return
        self.recognised += len(sites)
        for reason, _ in path["refusals"]:
            kind = "no attention" if is_no_attention(reason) else "refused"
            _append(self.causes[f"{kind}: {gist(reason)}"], name)
        missed = executed - len(sites) - len(path["refusals"])
        dead = min(record["unread"], max(0, missed))
        self.dead, missed = self.dead + dead, missed - dead
        others = executed - dead - max(record["attention"] - dead, len(sites))
        self.others += others
        self.silent += max(0, missed)
        self.refused += executed - dead - others - len(sites) - max(0, missed)
        if missed:
            self.causes[f"{'silently missed' if missed > 0 else 'counted more than executed'}"].append(
                f"{name} ({abs(missed)})"
            )
        for label, found in (("wrong", path["wrong"]), ("odd", path["odd"])):
            if found:
                setattr(self, label, getattr(self, label) + 1)
                title = "broken contract" if label == "wrong" else f"other sites than export's: {gist(found[0])}"
                self.causes[title].append(f"{name} ({found[0]})" if label == "wrong" else name)
        if path["failed"]:
            self.unused += 1
            self.causes[f"rewritten, then failed in {path['stage']}: {gist(path['failed'])}"].append(name)
        if path["original"]:
            self.bound += 1
            self.causes[f"holds for a part of the sizes: {gist(path['original'][0].partition(': ')[2])}"].append(name)
        for cause in path.get("helped", ()):
            self.causes[f"torch alone makes no such program; recognised with help for {cause}"].append(name)
        for label, title in (
            ("false", "no attention when it ran, but a site"),
            ("denied", "attention, but called none"),
        ):
            for line in path[label]:
                setattr(self, label, getattr(self, label) + int(line.rpartition("(")[2][:-1]))
                self.causes[title].append(f"{name} ({line})")


def gist(message: str) -> str:
    """The first lines of a message without numbers and names, so that equal causes have one title."""
    text = " ".join(message.split())
    text = re.sub(r"`[^`]*`|'[^']*'|/\S+", "…", text)
    return re.sub(r"\b[su]?\d+\b", "N", text)[:150]


def rows(records: Iterable[dict[str, Any]]) -> list[Row]:
    """One row per spelling through export and through Dynamo, one for core ATen."""
    ran = [r for r in records if r.get("executed")]
    ways: list[tuple[str, str, Callable[[dict[str, Any]], bool]]] = [
        ("export, eager", "export", lambda r: r["spelling"] == "eager"),
        ("export, sdpa", "export", lambda r: r["spelling"] == "sdpa"),
        ("Dynamo, eager", "dynamo", lambda r: r["spelling"] == "eager"),
        ("Dynamo, sdpa", "dynamo", lambda r: r["spelling"] == "sdpa"),
        ("core ATen", "core", lambda r: True),
    ]
    table = []
    for title, way, belongs in ways:
        row = Row(title)
        for record in ran:
            if belongs(record):
                row.add(record, way)
        table.append(row)
    return table


def markdown(records: list[dict[str, Any]]) -> str:
    """The table of ways, Inductor's count, and every cause with the architectures it concerns."""
    table = rows(records)
    lines = [
        "| way | architectures | executed | no attention | reach no output | recognised | refused | silent | failed before (architectures) "
        "| contract broken | rewritten forward failed | holds for a part of the sizes | other sites than export | false matches | called no attention |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in table:
        share = f" ({100 * r.recognised / r.attention:.1f} %)" if r.attention else ""
        lines.append(
            f"| {r.name} | {r.architectures} | {r.executed} | {r.others} | {r.dead} | {r.recognised}{share} | {r.refused} | {r.silent} "
            f"| {r.failed} ({r.failed_architectures}) | {r.wrong} | {r.unused} | {r.bound} | {r.odd} | {r.false} | {r.denied} |"
        )
    lines += ["", *_totals(records), ""]
    for r in table:
        for cause, names in sorted(r.causes.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
            lines.append(f"- {r.name}: {cause}: {len(names)}: {shown}")
    return "\n".join(lines)


def _totals(records: list[dict[str, Any]]) -> list[str]:
    absent = [r for r in records if r.get("not_built")]
    built = {r["name"] for r in records if not r.get("not_built")}
    attention = {r["name"] for r in records if r.get("executed")}
    said = [
        f"{len(built) + len(absent)} architectures, {len(built)} built, {len(attention)} of them execute a softmax."
    ]
    late = [r["name"] for r in records if r.get("late")]
    if late:
        said.append(f"Stopped at the time limit: {', '.join(late)}.")
    asked = [r for r in records if r.get("fused") is not None and r["executed"]]
    if asked:
        some = sum(r["fused"] > 0 for r in asked)
        fused, ran = sum(r["fused"] for r in asked), sum(r["executed"] for r in asked)
        said.append(
            f"Inductor's patterns, eager spelling, without a padding mask: {fused} of {ran} sites, in {some} of {len(asked)} architectures."
        )
    causes: dict[str, list[str]] = defaultdict(list)
    for r in absent:
        causes[gist(r["not_built"])].append(r["name"])
    said += [f"- not built: {cause}: {', '.join(names)}" for cause, names in causes.items()]
    return said


def _append(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)
