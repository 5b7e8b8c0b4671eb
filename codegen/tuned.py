"""Measures schedules once per kernel, device and version, and remembers them on disk; never per sequence length."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

from subquad.codegen.cache import directory
from subquad.ir.kernel_spec import KernelSpec

FEW = 4
"""Most candidates that are measured, the cost model's best first."""
ROWS = 1024
"""Fewest query rows of a call that is worth measuring on: shorter ones are all launch."""

_tried: set[tuple[str, str]] = set()


def key(spec: KernelSpec) -> str:
    """What a schedule depends on: the spec without schedule and optional inputs; all parts of a recurrence share one, and
    so do the gradients of a softmax.
    """
    part = "states" if spec.op == "recurrence" else "grad_keys" if spec.part.startswith("grad") else spec.part
    return replace(spec, part=part, block_q=64, block_kv=64, num_warps=4, num_stages=1, flags=()).hash


def lookup(spec: KernelSpec) -> tuple[Any, ...] | None:
    """The fields of the measured schedule of this spec on this process's device, or None."""
    place = _place()
    return None if place is None else _read(place).get(key(spec))


def settle(spec: KernelSpec, rows: int, candidates: Callable[[], Sequence[Any]], run: Callable[[Any], None]) -> None:
    """Measure the few best candidates by `run` if this spec was never measured on this device, and remember the fastest.

    Nothing happens without a GPU, for a call of few rows, while a CUDA graph is recorded, or where nothing is to be chosen.
    """
    place = _place()
    if place is None or rows < ROWS or (place, key(spec)) in _tried or lookup(spec) is not None or _recording():
        return
    _tried.add((place, key(spec)))
    few = list(candidates())[:FEW]
    if len(few) > 1:
        measure(spec, few, run)


def measure(
    spec: KernelSpec,
    candidates: Sequence[Any],
    run: Callable[[Any], None],
    repeats: int = 5,
    clock: Callable[[Callable[[], None]], float] | None = None,
) -> Any:
    """Time `run` for each candidate schedule on the current GPU (median of `repeats`), remember the fastest and return it.

    clock: milliseconds of one call, by default between two CUDA events. A candidate that fails to build or launch is
    passed over. Raises RuntimeError without a GPU or if none runs.
    """
    place = _place()
    if place is None:
        raise RuntimeError("Schedules are measured on a GPU, and torch sees none.")
    timed = clock or milliseconds
    times: list[tuple[float, int]] = []
    for index, candidate in enumerate(candidates):
        try:
            run(candidate)
            samples = sorted(timed(functools.partial(run, candidate)) for _ in range(repeats))
        except Exception:  # out of shared memory, or a compiler error: this candidate does not exist here
            continue
        times.append((samples[repeats // 2], index))
    if not times:
        raise RuntimeError(f"No schedule of {spec.op} {spec.operator} runs on this device.")
    best = candidates[min(times)[1]]
    _read.cache_clear()
    known = dict(_read(place)) | {key(spec): astuple(best)}
    handle, temporary = tempfile.mkstemp(dir=directory(), suffix=".partial")
    with os.fdopen(handle, "w") as file:
        json.dump(known, file)
    os.replace(temporary, directory() / place)
    _read.cache_clear()
    return best


def milliseconds(run: Callable[[], None]) -> float:
    """Time of one call between two CUDA events."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _recording() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _place() -> str | None:
    """File name of this device's schedules, or None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    import triton

    name = "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name())
    return f"schedules_{name}_{triton.__version__}_{importlib.metadata.version('subquad')}.json"


@functools.cache
def _read(place: str) -> dict[str, tuple[Any, ...]]:
    path = directory() / place
    if not path.exists():
        return {}

    def frozen(value: Any) -> Any:
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return {name: frozen(fields) for name, fields in json.loads(path.read_text()).items()}
