"""Everything that needs a GPU, in one go: generated kernels in bf16 against fp64, then times against peers and the limits.

Writes gpu.json and gpu.md to --out after every section, so that an interruption keeps what was measured. Without a GPU it says
so and exits with status 2; --rehearse walks the same path on a CPU with tiny sizes, to find mistakes in the script.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_cases import (
    RECURRENCES,
    SOFTMAXES,
    TIMED,
    Shape,
    Timing,
    decoding_timing,
    recurrence_timing,
    softmax_timing,
    surrounded_timing,
)

from subquad.codegen import recurrence_template, softmax_template

BUDGET = 450.0
"""Seconds after which no further case is started."""
TOLERANCE = {"bfloat16": 0.02, "float32": 1e-4}
"""RMS ratio that a check must stay under."""
CASE_TOLERANCE = {"bfloat16": 0.05, "float32": 1e-4}
"""The same for the cases with optional inputs, among which are delta rules with beta up to 2."""
TESTS = Path(__file__).resolve().parent.parent / "tests"
Row = dict[str, Any]


def check(case: tuple[str, str, str, str, int]) -> Row:
    """Forward and all gradients of one operator on the GPU against the fp64 reference, in a process of its own, which also
    fills Triton's cache for the timings.
    """
    family, name, device, dtype, size = case
    from subquad.codegen.self_check import recurrence_error, softmax_error

    begin = time.perf_counter()
    kind = getattr(torch, dtype)
    row: Row = {"operator": f"{family}: {name}", "dtype": dtype, "head size": size}
    try:
        if family == "softmax":
            error = softmax_error(torch.device(device), kind, SOFTMAXES[name].json(), size, size)
        else:
            hidden = size if "@" in RECURRENCES[name].feature_map[0] else 0
            error = recurrence_error(torch.device(device), kind, RECURRENCES[name].json(), size, size, hidden)
        row |= {"error": error, "right": error <= TOLERANCE[dtype]}
    except Exception as failure:
        row |= {"error": None, "right": False, "failure": f"{type(failure).__name__}: {str(failure)[:300]}"}
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def check_case(wished: dict[str, Any]) -> Row:
    """One case of tests/codegen_cases.py, whose optional inputs and states the operators of `check` do not have."""
    sys.path.append(str(TESTS))
    from codegen_runner import errors

    begin = time.perf_counter()
    told = " ".join(f"{name}={value}" for name, value in wished.items() if name not in ("op", "device", "dtype"))
    row: Row = {"operator": f"{wished['op']}: {told}", "dtype": wished["dtype"], "head size": wished["shape"][2]}
    try:
        found = errors(wished)
        row |= {"error": max(found.values()), "worst": max(found, key=found.__getitem__)}
        row["right"] = row["error"] <= CASE_TOLERANCE[wished["dtype"]]
    except Exception as failure:
        row |= {"error": None, "right": False, "failure": f"{type(failure).__name__}: {str(failure)[:300]}"}
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def checks(device: torch.device, rehearse: bool) -> list[Row]:
    """Every operator's check in bf16 with heads of 64, then the cases of every optional input, several processes at a time;
    a rehearsal takes a few of the cases.
    """
    sys.path.append(str(TESTS))
    from codegen_cases import QUICK, THOROUGH

    named = [("softmax", name, str(device), "bfloat16", 64) for name in SOFTMAXES]
    named += [("recurrence", name, str(device), "bfloat16", 64) for name in RECURRENCES]
    cases = [case | {"device": str(device), "dtype": "float32"} for case in QUICK]
    cases += [case | {"device": str(device), "dtype": "bfloat16"} for case in (*QUICK, *THOROUGH)]
    if rehearse:
        named, cases = [], [cases[0], cases[len(QUICK) - 1]]
    with ProcessPoolExecutor(1 if rehearse else 8, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = []
        for row in itertools.chain(pool.map(check, named), pool.map(check_case, cases)):
            rows.append(row)
            said = row.get("failure") or f"{row['error']:.1e}"
            print(
                f"  {row['operator'][:60]:60s} {'right' if row['right'] else 'WRONG'}  {said}  {row['seconds']} s",
                flush=True,
            )
    return rows


def unchecked(kernels: Path) -> list[str]:
    """The kernels that were never printed into the cache `kernels`, and so never ran."""
    known = {f"softmax_attention_{part}" for part in softmax_template.WRITERS}
    known |= {f"recurrence_{part}" for part in recurrence_template.WRITERS}
    return sorted(known - {path.stem.rsplit("_", 1)[0] for path in kernels.glob("*.py")})


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def alternating(runs: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each, all in turn; a string where one fails."""
    found: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            for _ in range(2):
                run()
        except Exception as failure:
            found[name] = f"{type(failure).__name__}: {str(failure)[:120]}"
    times: dict[str, list[float]] = {name: [] for name in runs if name not in found}
    for _ in range(repeats):
        for name in times:
            times[name].append(milliseconds(runs[name], device))
    return found | {name: statistics.median(values) for name, values in times.items()}


def limits(device: torch.device, size: int) -> dict[str, float]:
    """Measured bytes per second of a copy and bf16 operations per second of a matrix product."""
    source = torch.ones(size * size * 8, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = alternating({"copy": lambda: target.copy_(source)}, device, 10)["copy"]
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = alternating({"product": lambda: a @ a}, device, 10)["product"]
    return {
        "bytes_per_second": 2 * source.numel() * 2 / copy * 1e3,
        "operations_per_second": 2 * size**3 / product * 1e3,
    }


def timed(case: Timing, device: torch.device, limit: dict[str, float], repeats: int) -> list[Row]:
    """Rows of one case: forward, and forward with backward."""
    rows = []
    passes = [("forward", 1.0, case.runs)]
    if case.backward:
        passes.append(("forward + backward", 3.5, {name: _with_backward(run, case) for name, run in case.runs.items()}))
    for label, work, runs in passes:
        took = alternating(runs, device, repeats)
        bound = max(
            case.bytes * min(work, 3.0) / limit["bytes_per_second"],
            case.operations * work / limit["operations_per_second"],
        )
        row: Row = {
            "operator": case.name,
            "shape": str(case.shape),
            "pass": label,
            "milliseconds": took,
            "limit": bound * 1e3,
        }
        ours = took.get("subquad")
        if isinstance(ours, float):
            row["of the limit"] = bound * 1e3 / ours
            row["ratio"] = {
                name: other / ours for name, other in took.items() if isinstance(other, float) and name != "subquad"
            }
        rows.append(row)
        print(f"  {case.name:16s} {case.shape!s:26s} {label:19s} {_said(took)}", flush=True)
    return rows


def _with_backward(run: Callable[[], Any], case: Timing) -> Callable[[], Any]:
    def both() -> None:
        out = run()
        torch.autograd.grad(out, case.leaves, torch.ones_like(out), allow_unused=True)

    return both


def _said(took: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.3f} ms" if isinstance(value, float) else f"{name}: {value}" for name, value in took.items()
    )


def timing_cases(rehearse: bool, device: torch.device, dtype: torch.dtype) -> list[Callable[[], Timing]]:
    """Builders of the cases, most telling first; tensors are made when a case is reached."""
    if rehearse:
        small = Shape(1, 80, 2, 1, 16)
        plain = Shape(1, 80, 2, 2, 16)
        return [
            *(partial(recurrence_timing, name, plain, device, dtype) for name in TIMED),
            lambda: softmax_timing("causal", small, device, dtype),
            lambda: decoding_timing(small, 32, device, dtype),
            *(partial(surrounded_timing, family, plain, device, dtype) for family in ("softmax", "gated delta")),
        ]  # fmt: skip
    cases: list[Callable[[], Timing]] = []
    for b, t in ((16, 2048), (4, 8192), (1, 32768)):
        shape = Shape(b, t, 16, 16, 128)
        cases += [partial(recurrence_timing, name, shape, device, dtype) for name in TIMED]
    for b, t in ((8, 2048), (2, 8192)):
        cases.append(partial(softmax_timing, "causal", Shape(b, t, 32, 8, 128), device, dtype))
    cases.append(lambda: softmax_timing("window 1024", Shape(1, 16384, 32, 8, 128), device, dtype, window=1024))
    cases.append(lambda: decoding_timing(Shape(32, 8192, 32, 8, 128), 0, device, dtype))
    for family, heads in (("softmax", 8), ("gated delta", 32)):
        cases.append(partial(surrounded_timing, family, Shape(4, 4096, 32, heads, 128), device, dtype))
    cases.append(lambda: decoding_timing(Shape(32, 8256, 32, 8, 128), 8192, device, dtype))
    return cases


def table(result: dict[str, Any]) -> str:
    """The result as markdown."""
    lines = [
        f"## {result['device']}",
        "",
        result["versions"],
        "",
        "| operator | dtype | head | error (RMS ratio) | |",
        "|---|---|---|---|---|",
    ]
    for row in result["checks"]:
        error = row.get("failure") or f"{row['error']:.1e}"
        lines.append(
            f"| {row['operator']} | {row['dtype']} | {row['head size']} | {error} | {'right' if row['right'] else '**wrong**'} |"
        )
    lines += [
        "",
        "| operator | shape | pass | ms | limit ms | of the limit | peers: ms (ratio) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["timings"]:
        took = row["milliseconds"]
        ours = took.get("subquad")
        peers = [
            f"{name} {value:.3f} ({row.get('ratio', {}).get(name, 0.0):.2f}×)" if isinstance(value, float) else f"{name}: {value}"
            for name, value in took.items() if name != "subquad"
        ]  # fmt: skip
        mine = f"{ours:.3f}" if isinstance(ours, float) else str(ours)
        part = f"{row['of the limit']:.0%}" if "of the limit" in row else ""
        cells = (
            row["operator"],
            row["shape"],
            row["pass"],
            mine,
            f"{row['limit']:.3f}",
            part,
            ", ".join(peers) or "none",
        )
        lines.append(f"| {' | '.join(cells)} |")
    if result.get("unchecked"):
        lines += ["", f"Kernels that no check ran: {', '.join(result['unchecked'])}."]
    if result["left out"]:
        lines += ["", f"Left out for time: {result['left out']} cases."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run all sections within the budget; the exit status is 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="gpu_results", help="directory for gpu.json and gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, to test this script")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not chosen.rehearse:
        print("No GPU is visible to torch, so nothing was measured.", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    device = torch.device("cpu" if chosen.rehearse else "cuda")
    dtype = torch.float32 if chosen.rehearse else torch.bfloat16
    name = "rehearsal on a CPU" if chosen.rehearse else torch.cuda.get_device_name()
    result: dict[str, Any] = {"device": name, "versions": _versions(), "checks": [], "timings": [], "left out": 0}
    out = Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    os.environ["SUBQUAD_CACHE"] = str(out.resolve())
    shutil.rmtree(out / "kernels", ignore_errors=True)

    def write() -> None:
        result["seconds"] = round(time.perf_counter() - begin, 1)
        (out / "gpu.json").write_text(json.dumps(result, indent=1))
        (out / "gpu.md").write_text(table(result))

    print("checks", flush=True)
    if chosen.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        print("  none: a rehearsal runs them with TRITON_INTERPRET=1")
    else:
        result["checks"] = checks(device, chosen.rehearse)
    result["unchecked"] = unchecked(out / "kernels")
    write()
    result["limits"] = limits(device, 128 if chosen.rehearse else 8192)
    print("timings", flush=True)
    cases = timing_cases(chosen.rehearse, device, dtype)
    for index, build in enumerate(cases):
        if time.perf_counter() - begin > BUDGET:
            result["left out"] = len(cases) - index
            break
        try:
            result["timings"] += timed(build(), device, result["limits"], 3 if chosen.rehearse else 15)
        except Exception as failure:
            print(f"  case {index} failed: {type(failure).__name__}: {str(failure)[:200]}", file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write()
    write()
    print(table(result))
    complete = chosen.rehearse or not result["unchecked"]
    return 0 if complete and all(row["right"] for row in result["checks"]) else 1


def _versions() -> str:
    found = [f"torch {torch.__version__}"]
    for module in ("triton", "fla"):
        try:
            found.append(f"{module} {getattr(__import__(module), '__version__', '?')}")
        except ImportError:
            found.append(f"{module} not installed")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
