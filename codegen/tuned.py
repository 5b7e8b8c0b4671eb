"""Remembers measured schedules on disk, per device, Triton version and kernel, and never per sequence length."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

from subquad.codegen.cache import directory
from subquad.ir.kernel_spec import KernelSpec


def key(spec: KernelSpec) -> str:
    """What a schedule depends on: the spec without schedule and optional inputs; all parts of a recurrence share one."""
    plain = replace(spec, block_q=64, block_kv=64, num_warps=4, num_stages=1, flags=())
    return (replace(plain, part="states") if spec.op == "recurrence" else plain).hash


def lookup(spec: KernelSpec) -> tuple[Any, ...] | None:
    """The fields of the measured schedule of this spec on this process's device, or None."""
    place = _place()
    return None if place is None else _read(place).get(key(spec))


def measure(spec: KernelSpec, candidates: Sequence[Any], run: Callable[[Any], None], repeats: int = 5) -> Any:
    """Time `run` for each candidate schedule on the current GPU (CUDA events, median), remember the fastest and return it.

    A candidate that fails to build or launch is passed over. Raises RuntimeError without a GPU or if none runs.
    """
    import torch

    place = _place()
    if place is None:
        raise RuntimeError("Schedules are measured on a GPU, and torch sees none.")
    times: list[tuple[float, int]] = []
    for index, candidate in enumerate(candidates):
        try:
            run(candidate)
            samples = []
            for _ in range(repeats):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run(candidate)
                end.record()
                end.synchronize()
                samples.append(begin.elapsed_time(end))
            times.append((sorted(samples)[repeats // 2], index))
        except Exception:  # out of shared memory, or a compiler error: this candidate does not exist here
            continue
    if not times:
        raise RuntimeError(f"No schedule of {spec.op} {spec.operator} runs on {torch.cuda.get_device_name()}.")
    best = candidates[min(times)[1]]
    known = dict(_read(place)) | {key(spec): astuple(best)}
    handle, temporary = tempfile.mkstemp(dir=directory(), suffix=".partial")
    with os.fdopen(handle, "w") as file:
        json.dump(known, file)
    os.replace(temporary, directory() / place)
    _read.cache_clear()
    return best


@functools.cache
def _place() -> str | None:
    """File name of this device's schedules, or None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    import triton

    name = "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name())
    return f"schedules_{name}_{triton.__version__}.json"


@functools.cache
def _read(place: str) -> dict[str, tuple[Any, ...]]:
    path = directory() / place
    if not path.exists():
        return {}

    def frozen(value: Any) -> Any:
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return {name: frozen(fields) for name, fields in json.loads(path.read_text()).items()}
