"""Write schedules as JSON, each distinct program once, and read them back with every reference checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from subquad.runtime.graph_file import read_graph, write_graph
from subquad.runtime.schedule import Call, InputForm, Program, Schedule, Varying


def write_schedules(schedules: Mapping[str, Schedule]) -> dict[str, Any]:
    """The schedules as plain data.  Raises ArtifactError for an operation that may not be stored."""
    programs = {p.key: p for schedule in schedules.values() for p in schedule.programs()}
    place = {key: n for n, key in enumerate(programs)}
    return {
        "programs": [
            {
                "graph": write_graph(p.graph),
                "counts": list(p.counts),
                "fresh": p.fresh,
                "weights": list(p.weights),
            }
            for p in programs.values()
        ],
        "schedules": {name: _write_schedule(schedule, place) for name, schedule in schedules.items()},
    }


def read_schedules(data: Mapping[str, Any]) -> dict[str, Schedule]:
    """What `write_schedules` wrote.  Raises ArtifactError for a damaged graph; KeyError, TypeError, ValueError or IndexError
    for the rest.
    """
    programs = [
        Program(read_graph(item["graph"]), tuple(item["counts"]), int(item["fresh"]), tuple(item["weights"]))
        for item in data["programs"]
    ]
    return {str(name): _read_schedule(item, programs) for name, item in data["schedules"].items()}


def write_form(form: InputForm) -> list[Any]:
    """[dtype, size of each axis]; a varying size is [example, largest or null]."""
    return [str(form.dtype).removeprefix("torch."), [list(s) if isinstance(s, Varying) else s for s in form.sizes]]


def read_form(data: Any) -> InputForm:
    """The form that `write_form` wrote.  Raises ValueError, TypeError or AttributeError for anything else."""
    name, sizes = data
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is not a dtype")
    return InputForm(dtype, tuple(Varying(*size) if isinstance(size, list) else int(size) for size in sizes))


def _write_schedule(schedule: Schedule, place: dict[str, int]) -> dict[str, Any]:
    return {
        "entry": place[schedule.entry.key],
        "calls": [[place[c.program.key], list(c.sides), list(c.weights), list(c.states)] for c in schedule.calls],
        "raw": list(schedule.raw),
        "tail": schedule.tail,
        "forms": [
            [write_form(form) for form in schedule.forms[p.key]] for p in schedule.programs() if p.key in schedule.forms
        ],
    }


def _read_schedule(data: dict[str, Any], programs: list[Program]) -> Schedule:
    entry = programs[data["entry"]]
    calls = [Call(programs[n], tuple(sides), tuple(names), tuple(states)) for n, sides, names, states in data["calls"]]
    schedule = Schedule(entry, calls, tuple(data["raw"]), int(data["tail"]))
    made = len(entry.graph.output_node().args[0]) - 1 + len(schedule.raw)  # type: ignore[arg-type]
    for call in calls:
        given = (len(call.sides), len(call.weights), len(call.states))
        if given != call.program.counts or not all(0 <= side < made for side in call.sides):
            raise ValueError("a call does not fit its program")
    known = data["forms"]
    for program, forms in zip(schedule.programs() if known else (), known, strict=True):
        schedule.forms[program.key] = tuple(map(read_form, forms))
    return schedule
