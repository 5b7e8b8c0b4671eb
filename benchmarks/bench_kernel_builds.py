"""Builds every kernel of the common operators for all targets: registers, spills, shared memory, and the time it takes."""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from dataclasses import replace

import machine
from gpu_cases import RECURRENCES, SOFTMAXES, surroundings

from subquad.codegen import SHARED_LIMITS, build_all, operator_kernels
from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels import RecurrenceSpec


def bases(size: int, dtype: str) -> dict[str, KernelSpec]:
    """One base spec per operator of benchmarks/gpu.py, with heads of `size`."""
    found = {}
    for name, softmax in SOFTMAXES.items():
        tables = ("int64",) if "t0" in (softmax.mask or "") else ()
        found[f"softmax: {name}"] = KernelSpec("softmax_attention", softmax.json(), dtype, size, size, tables=tables)
    for name, what in RECURRENCES.items():
        found[f"recurrence: {name}"] = recurrence(what, size, dtype)
    for name in ("softmax: causal", "recurrence: normalised", "recurrence: gated delta", "recurrence: LoLCATs"):
        around = surroundings(size, keys_too="LoLCATs" not in name)
        found[f"{name}, norms, RoPE, gate"] = replace(found[name], around=around.json())
    return found


def recurrence(what: RecurrenceSpec, size: int, dtype: str) -> KernelSpec:
    """The base spec of a recurrence; feature weights are square, windows have a gate."""
    hidden = size if any("@" in text for text in what.feature_map) else 0
    return KernelSpec("recurrence", what.json(), dtype, size, size, hidden, flags=("gate",) if what.window else ())


def main() -> None:
    """Build, then print one row per operator and target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="size of a head")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--targets", nargs="*", default=list(SHARED_LIMITS))
    parser.add_argument("--only", default="", help="operators whose name contains this")
    chosen = parser.parse_args()
    print(machine.line())
    chosen_bases = {name: base for name, base in bases(chosen.size, chosen.dtype).items() if chosen.only in name}
    jobs = [
        (name, spec)
        for name, base in chosen_bases.items()
        for target in chosen.targets
        for spec in operator_kernels(replace(base, target=target))
    ]
    unique = list(dict.fromkeys(spec for _, spec in jobs))
    with tempfile.TemporaryDirectory() as fresh:
        os.environ |= {"TRITON_CACHE_DIR": f"{fresh}/triton", "SUBQUAD_CACHE": f"{fresh}/subquad"}
        begin = time.perf_counter()
        made = dict(zip(unique, build_all(unique), strict=True))
        took = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = usage.ru_utime + usage.ru_stime
    cores = len(os.sched_getaffinity(0))
    print(f"{len(unique)} kernels in {took:.0f} s on {cores} cores, nothing cached; {spent:.0f} CPU seconds\n")
    print("| operator | target | kernels | most registers | spilling | most shared bytes | of the limit |")
    print("|---|---|---|---|---|---|---|")
    for name in chosen_bases:
        for target in chosen.targets:
            specs = [spec for one, spec in jobs if one == name and spec.target == target]
            reports = [made[spec] for spec in specs]
            spilling = [spec.part for spec in specs if made[spec].spills]
            shared = max(report.shared_bytes for report in reports)
            registers = max(report.registers or 0 for report in reports)
            told = ", ".join(sorted(set(spilling))) or "none"
            print(
                f"| {name} | {target} | {len(reports)} | {registers} | {told} | {shared} | {shared / SHARED_LIMITS[target]:.0%} |"
            )


if __name__ == "__main__":
    main()
