"""The child process that compiles decoder programs: reads a job file, writes packages, prints a line for each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from subquad.kernels.narrow_attention import C_DECLARATION as ATTENTION
from subquad.kernels.narrow_attention import narrow_attention_torch
from subquad.kernels.narrow_linear import C_DECLARATION as LINEAR
from subquad.kernels.narrow_linear import DTYPES
from subquad.lowering import lower
from subquad.native_library import build, load
from subquad.runtime.graph_file import read_graph
from subquad.runtime.schedule import InputForm, Varying
from subquad.runtime.schedule_file import read_form

TORCH_FORMS = {
    torch.ops.subquad.narrow_linear.default: torch.ops.aten.linear.default,
    torch.ops.subquad.narrow_attention.default: narrow_attention_torch,
}
"""What stands for the operators that have C++ forms where these cannot be used."""


def main(path: str) -> None:
    """Compile every job of the file at `path`."""
    if hasattr(os, "nice"):
        os.nice(5)
    work = json.loads(Path(path).read_text())
    torch.set_num_threads(work["threads"])
    library = Path(work["library"])
    native = library.exists() or build(library)
    if native:
        load(library)
    for job in work["jobs"]:
        compile_job(job, native)
        print("done", flush=True)


def compile_job(job: dict[str, Any], native: bool) -> None:
    """Compile one graph into the package file job["path"], which appears whole or not at all.

    native: the library of C++ forms is there; without it, and in dtypes it lacks, operators take their torch forms.
    """
    forms = [read_form(item) for item in job["inputs"]]
    inputs = tuple(_example(form) for form in forms)
    graph = read_graph(job["graph"])
    if not native or any(t.is_floating_point() and t.dtype not in DTYPES for t in inputs):
        for operator, form in TORCH_FORMS.items():
            for node in graph.find_nodes(op="call_function", target=operator):
                node.target = form
    lower(graph)
    _bound(graph, forms)
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    dynamic = tuple(_varying(form) or None for form in forms)
    with torch.no_grad():
        program = torch.export.export(
            module, inputs, dynamic_shapes=(dynamic,) if _variadic(module) else dynamic, strict=False
        )
    target = Path(job["path"])
    fresh = target.with_suffix(f".{os.getpid()}.partial.pt2")
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(fresh), inductor_configs=_configuration(native)
        )
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)


def _variadic(module: torch.fx.GraphModule) -> bool:
    return module.forward.__code__.co_argcount == 1


def _configuration(native: bool) -> dict[str, Any]:
    """Inductor settings: fused multiply-add, sums of small parts in one loop, and direct calls of the C++ forms."""
    import torch._inductor.config as known

    wanted: dict[str, Any] = {"force_pointwise_cat": True}
    if hasattr(known.cpp, "enable_floating_point_contract_flag"):
        wanted["cpp.enable_floating_point_contract_flag"] = "fast"
    if native:
        wanted["aot_inductor.custom_ops_to_c_shims"] = {
            torch.ops.subquad.narrow_linear.default: [LINEAR],
            torch.ops.subquad.narrow_attention.default: [ATTENTION],
        }
    return wanted


def _example(form: InputForm) -> torch.Tensor:
    return torch.ones([s.example if isinstance(s, Varying) else s for s in form.sizes], dtype=form.dtype)


def _varying(form: InputForm) -> dict[int, Any]:
    return {axis: Dim.DYNAMIC(max=s.most) for axis, s in enumerate(form.sizes) if isinstance(s, Varying)}


def _bound(graph: torch.fx.Graph, forms: list[InputForm]) -> None:
    """State the limits of sizes in the graph, where forms that depend on them find them while they are traced."""
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        for node, form in zip(inputs, forms, strict=True):
            for axis, size in enumerate(form.sizes):
                if isinstance(size, Varying) and size.most is not None:
                    graph.call_function(_check_size, (node, axis, size.most))


def _check_size(x: torch.Tensor, axis: int, most: int) -> None:
    torch._check(x.shape[axis] <= most)


if __name__ == "__main__":
    main(sys.argv[1])
