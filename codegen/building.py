"""Compiles an emitted kernel ahead of time for a GPU that need not be there, and reports what it uses."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from subquad.codegen.cache import load, store
from subquad.codegen.running import EVERY_REGISTER, spilled_early
from subquad.codegen.source import arguments, emit
from subquad.codegen.text import STRIDE
from subquad.ir.kernel_spec import KernelSpec

SHARED_LIMITS = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}
"""Shared memory (LDS) a block may use on each known target, in bytes."""


@dataclass(frozen=True)
class BuildReport:
    """What a build made: the binary beside its source, shared memory, registers and spills (None where no tool tells),
    seconds.
    """

    path: Path
    shared_bytes: int
    registers: int | None
    spills: int | None
    seconds: float
    limit_bytes: int

    @property
    def fits(self) -> bool:
        """True if the target has the shared memory the kernel needs."""
        return self.shared_bytes <= self.limit_bytes


def build(kernel_spec: KernelSpec) -> BuildReport:
    """Compile for the spec's target ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"), whose schedule it has, without a GPU.

    Raises ValueError for an unknown target, and RuntimeError where triton is missing or its interpreter is on.
    """
    target = kernel_spec.target
    if target not in SHARED_LIMITS:
        raise ValueError(f"The target {target!r} is unknown; choose one of {', '.join(SHARED_LIMITS)}.")
    try:
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError:
        raise RuntimeError("Building kernels needs triton, which is not installed; pip install triton.") from None
    path = store(emit(kernel_spec), f"{kernel_spec.op}_{kernel_spec.part}")
    function = load(path).kernel
    if not isinstance(function, triton.runtime.JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET is set, which replaces the compiler; unset it to build kernels ahead of time."
        )
    kinds = dict(arguments(kernel_spec))
    signature = {name: kind.removesuffix(":16") for name, kind in kinds.items()}
    aligned = [index for index, kind in enumerate(kinds.values()) if kind.startswith("*") or kind == STRIDE]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    backend, _, architecture = target.partition(":")
    gpu = GPUTarget("cuda", int(architecture), 32) if backend == "cuda" else GPUTarget("hip", architecture, 64)
    options = {"num_warps": kernel_spec.num_warps, "num_stages": kernel_spec.num_stages, "enable_fp_fusion": True}
    kind = "cubin" if backend == "cuda" else "hsaco"
    binary = path.with_suffix(f".{target.replace(':', '_')}.{kernel_spec.hash[:8]}.{kind}")

    def made(extra: dict[str, int]) -> BuildReport:
        begin = time.perf_counter()
        text = ASTSource(function, signature=signature, constexprs={}, attrs=attributes)
        with knobs.compilation.scope():
            knobs.compilation.store_binary_only = True  # printing every stage would take a tenth of the time
            compiled = triton.compile(text, target=gpu, options=options | extra)
        seconds = time.perf_counter() - begin
        temporary = binary.with_suffix(".partial")
        temporary.write_bytes(compiled.asm[kind])
        temporary.replace(binary)
        registers, spills = _cuda_usage(binary) if backend == "cuda" else _hip_usage(compiled.asm[kind])
        return BuildReport(binary, compiled.metadata.shared, registers, spills, seconds, SHARED_LIMITS[target])

    report = made({})
    if backend == "cuda" and spilled_early(report.registers, report.spills):
        again = made(EVERY_REGISTER)
        report = replace(again, seconds=report.seconds + again.seconds)
    return report


def build_all(specs: Sequence[KernelSpec], processes: int | None = None) -> Iterator[BuildReport]:
    """`build` for each spec, in order, in as many processes as there are processors (or `processes`); specs whose programs
    differ in their header only share one build.
    """
    programs = [_program(spec) for spec in specs]
    first = dict(zip(reversed(programs), reversed(specs), strict=True))
    distinct = dict.fromkeys(programs)
    made: dict[tuple[str, str, int, int], BuildReport] = {}
    count = min(processes or len(os.sched_getaffinity(0)), len(distinct))
    with (
        ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _one_threaded)
        if count > 1
        else nullcontext() as pool
    ):
        chosen = [first[program] for program in distinct]
        built = zip(distinct, map(build, chosen) if pool is None else pool.map(build, chosen), strict=True)
        for program in programs:
            while program not in made:
                name, report = next(built)
                made[name] = report
            yield made[program]


def _one_threaded() -> None:
    """In a process that builds beside others, passes are not handed to threads of their own."""
    os.environ["MLIR_DISABLE_MULTITHREADING"] = "1"


def _program(spec: KernelSpec) -> tuple[str, str, int, int]:
    """What a build depends on: the source without its header, the target, warps and stages."""
    text = emit(spec)
    return text[text.index("import triton") :], spec.target, spec.num_warps, spec.num_stages


def _cuda_usage(binary: Path) -> tuple[int | None, int | None]:
    """(registers, bytes of local memory) as the cuobjdump bundled with triton tells."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    done = subprocess.run([str(tool), "-res-usage", str(binary)], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", done.stdout + done.stderr)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)


def _hip_usage(binary: bytes) -> tuple[int | None, int | None]:
    """(vector registers, spilled vector registers) from the metadata note of a code object, a map in MessagePack."""

    def number(key: bytes) -> int | None:
        before, found, behind = binary.partition(key)
        if not found:
            return None
        size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(behind[0], 0)
        return int.from_bytes(behind[1 : 1 + size], "big") if size else behind[0]

    return number(b".vgpr_count"), number(b".vgpr_spill_count")
