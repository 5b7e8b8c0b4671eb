"""The child process that compiles decoder programs: reads a job file, writes packages, prints a line for each."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

import subquad.kernels  # noqa: F401  (registers the operators)
from subquad.runtime.graph_file import read_graph


def main(path: str) -> None:
    """Compile every job of the file at `path`."""
    if hasattr(os, "nice"):
        os.nice(5)
    work = json.loads(Path(path).read_text())
    torch.set_num_threads(work["threads"])
    for job in work["jobs"]:
        compile_job(job)
        print("done", flush=True)


def compile_job(job: dict[str, Any]) -> None:
    """Compile one graph into the package file job["path"], which appears whole or not at all."""
    module = torch.fx.GraphModule(torch.nn.Module(), read_graph(job["graph"]))
    inputs = tuple(_example(item["shape"], getattr(torch, item["dtype"])) for item in job["inputs"])
    dynamic = tuple(dict.fromkeys(item["varying"], Dim.DYNAMIC) or None for item in job["inputs"])
    with torch.no_grad():
        program = torch.export.export(
            module, inputs, dynamic_shapes=(dynamic,) if _variadic(module) else dynamic, strict=False
        )
    target = Path(job["path"])
    fresh = target.with_suffix(f".{os.getpid()}.partial.pt2")
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(fresh), inductor_configs=_configuration())
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)


def _variadic(module: torch.fx.GraphModule) -> bool:
    return module.forward.__code__.co_argcount == 1


PREFETCHING = (
    "-fprefetch-loop-arrays --param max-completely-peel-times=128 --param max-completely-peeled-insns=8000 "
    "--param prefetch-latency=500 --param simultaneous-prefetches=128"
)
"""GCC fetches the next rows of a weight while it sums one: reading the weights is then a seventh faster (measured)."""


def _configuration() -> dict[str, Any]:
    """Inductor settings: fused multiply-add, and prefetching where GCC compiles for the machine it runs on."""
    import torch._inductor.config as known
    from torch._inductor.cpp_builder import get_cpp_compiler, is_gcc

    wanted: dict[str, Any] = {}
    if hasattr(known.cpp, "enable_floating_point_contract_flag"):
        wanted["cpp.enable_floating_point_contract_flag"] = "fast"
    if hasattr(known.cpp, "march") and not known.cpp.march and platform.machine() == "x86_64":
        get_cpp_compiler()
        if is_gcc():
            wanted["cpp.march"] = f"native {PREFETCHING}"
    return wanted


def _example(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


if __name__ == "__main__":
    main(sys.argv[1])
