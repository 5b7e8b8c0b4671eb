"""How much of the Hugging Face zoo is recognised and rewritten, beside Inductor's patterns; and what recognition costs."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import machine
import torch
import zoo
import zoo_growth
import zoo_runner
from zoo_inductor import fused_by_inductor
from zoo_inputs import inputs_of
from zoo_table import markdown

WAYS = ("rewrite", "dynamo", "core", "inductor")
"""What each architecture goes through beyond recognition; Inductor's patterns are counted in the eager spelling alone, core
ATen is entered from the spelling by SDPA where there is one, whose decomposition is what differs there."""


EACH = 80
"""Architectures that a process examines before a fresh one takes its place, since each leaves modules and caches behind."""


class _Late(BaseException):
    """The time limit of one architecture has passed."""


def examine(entry: zoo.Architecture, limit: int, wanted: tuple[str, ...]) -> list[dict[str, Any]]:
    """The outcomes of one architecture, one per spelling it has, as plain data.

    limit: seconds of processor time for one spelling.
    """
    _prepared()
    records: list[dict[str, Any]] = []
    for spelling in ("sdpa", "eager"):
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            specimen = zoo.build(entry, spelling)
            if any(r.get("spelling") == specimen.spelling for r in records):
                continue
            eager = specimen.spelling == "eager"
            skipped = {"inductor", "core"} if any(r.get("executed") for r in records) else {"inductor"}
            outcome = zoo_runner.run(specimen, tuple(way for way in wanted if way not in skipped))
            if eager and "inductor" in wanted and outcome.executed:
                outcome.fused = _fused(specimen)
            records.append(outcome.json())
        except zoo.NotBuilt as reason:
            return [{"name": entry.name, "not_built": str(reason)}]
        except _Late:
            records.append({"name": entry.name, "spelling": spelling, "late": limit})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return records


@functools.cache
def _prepared() -> None:
    """One thread, no messages, and garbage collected rarely: tracing makes many objects that live on."""
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _stop)
    gc.set_threshold(200_000, 50, 100)


def _stop(*_: Any) -> None:
    raise _Late


def _fused(specimen: zoo.Specimen) -> int | None:
    """Inductor's count at its best: without a padding mask, which keeps most of its patterns from matching."""
    inputs = inputs_of(specimen.model, specimen.architecture.kind)
    try:
        return fused_by_inductor(specimen.model, {k: v for k, v in inputs.items() if k != "attention_mask"})
    except Exception:
        return None


def outcomes(entries: list[zoo.Architecture], arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The outcomes of every entry, as they come."""
    if arguments.processes == 1:
        for entry in entries:
            yield examine(entry, arguments.limit, tuple(arguments.ways))
        return
    context = multiprocessing.get_context("forkserver")
    for first in range(0, len(entries), EACH * arguments.processes):
        with ProcessPoolExecutor(arguments.processes, context) as pool:
            slice_ = entries[first : first + EACH * arguments.processes]
            waiting = {pool.submit(examine, e, arguments.limit, tuple(arguments.ways)): e for e in slice_}
            for done in as_completed(waiting):
                try:
                    yield done.result()
                except BrokenProcessPool:
                    yield [{"name": waiting[done].name, "spelling": "", "late": 0}]


def run_zoo(arguments: argparse.Namespace) -> None:
    """Run the zoo, or what is left of it, and print the table."""
    path = Path(arguments.out)
    records = [json.loads(line) for line in path.read_text().splitlines()] if arguments.resume and path.exists() else []
    known = {r["name"] for r in records}
    entries = [e for e in zoo.architectures(*arguments.kinds) if arguments.match in e.name and e.name not in known]
    entries = entries[: arguments.at_most]
    start = time.perf_counter()
    with path.open("a" if arguments.resume else "w") as file:
        for count, found in enumerate(outcomes(entries, arguments), 1):
            for record in found:
                file.write(json.dumps(record) + "\n")
            file.flush()
            records.extend(found)
            _progress(count, len(entries), time.perf_counter() - start, found)
    print(machine.line())
    print(
        f"{len(entries)} architectures in {(time.perf_counter() - start) / 60:.1f} minutes, {arguments.processes} processes\n"
    )
    print(markdown(records))


def _progress(count: int, total: int, seconds: float, found: list[dict[str, Any]]) -> None:
    name = found[0]["name"] if found else ""
    print(
        f"\r{count}/{total} {seconds:5.0f} s {name:40s}",
        end="\n" if count == total else "",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Print the tables that are asked for; both without options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", action="store_true", help="run every architecture")
    parser.add_argument("--time", action="store_true", help="time recognition and its growth with the graph")
    parser.add_argument("--kinds", nargs="*", default=["causal", "masked", "seq2seq", "image"], choices=list(zoo.KINDS))
    parser.add_argument("--match", default="", help="only architectures whose name holds this")
    parser.add_argument("--limit", type=int, default=120, help="processor seconds for one architecture in one spelling")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--ways",
        nargs="*",
        default=list(WAYS),
        choices=WAYS,
        help="what follows recognition; nothing for it alone",
    )
    parser.add_argument("--out", default="coverage.jsonl", help="file for the outcomes, one JSON object a line")
    parser.add_argument("--resume", action="store_true", help="keep what the file holds and run the rest")
    parser.add_argument("--at-most", type=int, help="stop after this many architectures; --resume goes on")
    arguments = parser.parse_args()
    if arguments.time or not arguments.zoo:
        print(machine.line())
        zoo_growth.print_tables()
    if arguments.zoo or not arguments.time:
        run_zoo(arguments)


if __name__ == "__main__":
    main()
