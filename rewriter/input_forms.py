"""Find the dtypes and sizes of every program's inputs, and which sizes vary, by running the schedules on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from subquad.decoder import DecoderPrograms
from subquad.runtime.decode_engine import DecodeEngine, executor
from subquad.runtime.layout import BATCH, DecoderLayout
from subquad.runtime.schedule import InputForm, Program, Runner, Varying
from subquad.runtime.state import Recurrence, SharedKeys, key_buffers
from subquad.runtime.width_class import WidthClass
from subquad.weight_storage import TensorForm

Form = tuple[torch.dtype, tuple[int, ...]]
Seen = dict[str, list[tuple[Form, ...]]]


class _Probe(NamedTuple):
    """One call: rows, tokens a row, columns after it, columns that there is room for, and nodes and slots that rows share."""

    batch: int
    width: int
    total: int
    capacity: int
    nodes: int = 0
    slots: int = 0


def find_forms(programs: DecoderPrograms, weights: Mapping[str, TensorForm]) -> None:
    """Fill in the forms of every schedule.  weights: the forms of the tensors that they read, packed ones included."""
    device = next((form.device for form in weights.values()), torch.device("cpu"))
    for one in programs.layout.classes:
        schedule = programs.schedules[one.name]
        probes = _probes(one, programs.layout)
        runs = [_observed(programs, one.name, weights, probe, device) for probe in probes]
        capped = {(a, b) for a, b in zip(probes[0][:2], probes[1][:2], strict=True) if a != b}
        schedule.forms = {p.key: _joined(runs[0][p.key], runs[1][p.key], capped, one.most) for p in schedule.programs()}


def _probes(one: WidthClass, layout: DecoderLayout) -> tuple[_Probe, _Probe]:
    """Two calls that differ in every size that may vary within a class."""
    longest = min(layout.limit or 64, 64)
    short = longest // 2
    if one.most == 1:
        return _Probe(1, 1, short, 256), _Probe(1, 1, longest, 512)
    if one.start:
        return _Probe(2, short, short, 256), _Probe(3, longest, longest, 512)
    return _Probe(2, 3, short, 256, 6, 34), _Probe(3, 5, longest, 512, 7, 66)


def _observed(
    programs: DecoderPrograms, name: str, weights: Mapping[str, TensorForm], probe: _Probe, device: torch.device
) -> Seen:
    """The inputs of every call of every program."""
    schedule, seen = programs.schedules[name], Seen()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = {name: torch.empty(form.shape, dtype=form.dtype, device=device) for name, form in weights.items()}
        engine = DecodeEngine(programs.layout, {}, device)
        recording = executor(schedule, fake, {p.key: _recording(p, seen) for p in schedule.programs()})
        ids = torch.zeros(probe.batch, probe.width, dtype=torch.int64, device=device)
        state = engine.start(probe.batch, probe.capacity, _fixed(programs.layout, probe, device))
        if probe.nodes:
            state.shared = _shared(programs.layout, probe, state.recurrence, device)
        engine.probe(recording, state, ids, probe.total - probe.width)
    return seen


def _shared(layout: DecoderLayout, probe: _Probe, recurrence: Recurrence, device: torch.device) -> SharedKeys:
    """Keys that rows share, of these sizes."""
    _, k, v = key_buffers(layout, (probe.slots,), device)
    places = torch.zeros(probe.slots, dtype=torch.int64, device=device)
    nodes = torch.zeros(probe.nodes, 5, dtype=torch.int64)
    return SharedKeys(k, v, places, nodes, (0,) * probe.batch, recurrence)


def _fixed(layout: DecoderLayout, probe: _Probe, device: torch.device) -> tuple[Tensor, ...]:
    """Values of the inputs that do not grow, whose other sizes differ from probe to probe."""
    if layout.fixed is None:
        return ()

    def size(named: int | str) -> int:
        return named if isinstance(named, int) else probe.batch if named == BATCH else probe.capacity // 8 + 1

    return tuple(
        torch.empty([size(one) for one in sizes], dtype=dtype, device=device) for dtype, sizes in layout.fixed.forms
    )


def _recording(program: Program, seen: Seen) -> Runner:
    """Runs the program once for each set of input forms; fake outputs are as good the second time."""
    run = program.traced()
    known: dict[tuple[Form, ...], list[Tensor]] = {}

    def runner(inputs: list[Tensor]) -> list[Tensor]:
        forms = tuple((t.dtype, tuple(t.shape)) for t in inputs)
        seen.setdefault(program.key, []).append(forms)
        if forms not in known:
            known[forms] = run(inputs)
        return known[forms]

    return runner


def _joined(
    small: list[tuple[Form, ...]], large: list[tuple[Form, ...]], capped: set[tuple[int, int]], most: int
) -> tuple[InputForm, ...]:
    """One form per input: a size varies that differs between two calls of a run or between the runs."""
    forms = []
    for n, (dtype, sizes) in enumerate(small[0]):
        axes: list[int | Varying] = []
        for axis, size in enumerate(sizes):
            pairs = {(a[n][1][axis], b[n][1][axis]) for a, b in zip(small, large, strict=True)}
            if pairs == {(size, size)}:
                axes.append(size)
            else:
                axes.append(Varying(size, most if pairs <= capped else None))
        forms.append(InputForm(dtype, tuple(axes)))
    return tuple(forms)
