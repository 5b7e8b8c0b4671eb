"""Compile a decoder's programs ahead of time with Inductor, in a process of its own, and keep them in the private cache.

Each distinct program becomes one AOTInductor package with its weights as inputs, so that equal layers share it, nothing is
copied and it loads in a tenth of a second.  A package is keyed by the program, the operators' source, the torch version, the
CPU's features and the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import subquad.kernels
from subquad.ir.errors import SubquadError
from subquad.private_cache import cache_root
from subquad.runtime import graph_file, one_token
from subquad.runtime.schedule import Program, Runner

FORMAT = "1"


class CompilationError(SubquadError):
    """A program could not be compiled; the decoder goes on with the uncompiled one."""


@dataclass(frozen=True)
class Order:
    """One program to compile: example inputs and, per input, the axes whose sizes vary."""

    program: Program
    inputs: tuple[Tensor, ...]
    varying: tuple[tuple[int, ...], ...]

    @property
    def key(self) -> str:
        """The file name of its package."""
        shapes = [
            [str(t.dtype), *("?" if axis in free else str(size) for axis, size in enumerate(t.shape))]
            for t, free in zip(self.inputs, self.varying, strict=True)
        ]
        text = json.dumps([FORMAT, self.program.key, shapes, machine_key()])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def order(program: Program, small: Sequence[Tensor], large: Sequence[Tensor]) -> Order:
    """An order from two sets of inputs that differ in every size that shall vary."""
    varying = tuple(
        tuple(axis for axis in range(a.dim()) if a.shape[axis] != b.shape[axis])
        for a, b in zip(small, large, strict=True)
    )
    return Order(program, tuple(small), varying)


def machine_key() -> str:
    """What a compiled program depends on beside itself."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    here = Path(one_token.__file__)
    sources = [
        here,
        here.parent.parent / "compile_worker.py",
        *sorted(Path(subquad.kernels.__file__).parent.glob("*.py")),
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    threads = str(torch.get_num_threads())
    return "|".join((torch.__version__, platform.machine(), _cpu_flags(), str(pick_vec_isa()), threads, digest))


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]


def package_path(wanted: Order) -> Path:
    """Where the private cache keeps an order's package."""
    folder = cache_root() / "decoder"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{wanted.key}.pt2"


def load_package(path: Path) -> Runner:
    """The program of a package, as list of tensors to list of tensors, without the pytree wrapper's overhead."""
    from torch._inductor import aoti_load_package

    loaded: Any = aoti_load_package(str(path))
    run = loaded.loader.run

    def runner(inputs: list[Tensor]) -> list[Tensor]:
        return run(inputs)  # type: ignore[no-any-return]

    runner.__dict__["package"] = loaded
    return runner


def compile_orders(
    wanted: Sequence[Order], report: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Runner]:
    """Runners by program key; what the cache lacks is compiled in a child process, one program after another.

    report: called with (done, total) as programs become ready.  Raises CompilationError when the compiler fails.
    """
    paths = {o.program.key: package_path(o) for o in wanted}
    missing = [o for o in wanted if not paths[o.program.key].exists()]
    report(len(wanted) - len(missing), len(wanted))
    if missing:
        _run_worker(missing, paths, lambda done: report(len(wanted) - len(missing) + done, len(wanted)))
    return {key: load_package(path) for key, path in paths.items()}


def _run_worker(missing: Sequence[Order], paths: dict[str, Path], advance: Callable[[int], None]) -> None:
    jobs = [
        {
            "graph": graph_file.write_graph(o.program.graph.graph),
            "inputs": [
                {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "varying": list(free)}
                for t, free in zip(o.inputs, o.varying, strict=True)
            ],
            "path": str(paths[o.program.key]),
        }
        for o in missing
    ]
    with tempfile.TemporaryDirectory(prefix="subquad-") as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"threads": torch.get_num_threads(), "jobs": jobs}))
        log = Path(folder) / "log"
        with log.open("w") as errors:
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "subquad.compile_worker", str(job)],
                stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder + "/inductor"},
            )  # fmt: skip
            assert worker.stdout is not None
            try:
                for n, _ in enumerate(line for line in worker.stdout if line.startswith("done")):
                    advance(n + 1)
                worker.wait()
            finally:
                if worker.poll() is None:
                    worker.terminate()
                    worker.wait()
                worker.stdout.close()
        if worker.returncode:
            lines = [line for line in log.read_text().splitlines() if line.strip()]
            raise CompilationError(
                f"a decoder program could not be compiled ({lines[-1] if lines else worker.returncode})."
            )
