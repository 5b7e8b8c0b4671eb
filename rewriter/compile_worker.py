"""The child process that compiles decoder programs: reads a job file, writes packages, prints a line for each."""

from __future__ import annotations

import json
import os
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


def _configuration() -> dict[str, Any]:
    known = torch._inductor.config.get_config_copy()
    wanted = {"cpp.enable_floating_point_contract_flag": "fast"}
    return {key: value for key, value in wanted.items() if key in known}


def _example(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


if __name__ == "__main__":
    main(sys.argv[1])
