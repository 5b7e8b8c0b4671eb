"""Compile a decoder's programs ahead of time with Inductor, in a process of its own, and keep them in the private cache.

Each distinct program becomes one AOTInductor package with its weights as inputs, so that equal layers share it, nothing is
copied and it loads in a tenth of a second.  A package is keyed by the program, the operators' source, the torch version, the
CPU's features and the number of threads.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import subquad.kernels
from subquad import native_library
from subquad.ir.errors import SubquadError, first_line
from subquad.private_cache import cache_root
from subquad.runtime import few_tokens, graph_file
from subquad.runtime.schedule import InputForm, Program, Runner, Varying
from subquad.runtime.schedule_file import write_form

FORMAT = "1"


class CompilationError(SubquadError):
    """A program could not be compiled; the decoder goes on with the uncompiled one."""


@dataclass(frozen=True)
class Order:
    """One program to compile, for inputs of these forms."""

    program: Program
    forms: tuple[InputForm, ...]

    @property
    def key(self) -> str:
        """The file name of its package."""
        shapes = [
            [str(form.dtype), *(f"?{size.most}" if isinstance(size, Varying) else str(size) for size in form.sizes)]
            for form in self.forms
        ]
        text = json.dumps([FORMAT, self.program.key, shapes, machine_key()])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def machine_key() -> str:
    """What a compiled program depends on beside itself."""
    threads = str(torch.get_num_threads())
    return "|".join((torch.__version__, platform.machine(), _cpu_flags(), threads, _sources()))


@functools.cache
def _sources() -> str:
    """Hash of the source files that decide what is compiled."""
    here = Path(few_tokens.__file__)
    sources = [
        here,
        here.parent.parent / "compile_worker.py",
        here.parent.parent / "lowering.py",
        here.parent.parent / "native_library.py",
        *sorted(p for p in Path(subquad.kernels.__file__).parent.iterdir() if p.suffix in (".py", ".cpp", ".h")),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


@functools.cache
def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]


def package_path(key: str, suffix: str = ".pt2") -> Path:
    """Where the private cache keeps what was compiled under a key."""
    folder = cache_root() / "decoder"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{key}{suffix}"


def load_package(path: Path) -> Runner:
    """The program of a package, as list of tensors to list of tensors; it expects contiguous inputs and is given them."""
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except RuntimeError as error:
        raise CompilationError(f"a compiled program could not be loaded ({first_line(error)}).") from error
    run = loader.run

    def runner(inputs: list[Tensor]) -> list[Tensor]:
        return run([t if t.is_contiguous() else t.contiguous() for t in inputs])  # type: ignore[no-any-return]

    return runner


def compile_orders(
    wanted: Mapping[str, Sequence[Order]], report: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[str, dict[str, Runner]]]:
    """Yield each group's name and its runners by program key, in order, as soon as all programs of the group are there.

    What the cache lacks is compiled in one child process, one program after another.  report: called with (done, total)
    as programs become ready.  Raises CompilationError when the compiler fails.
    """
    paths = {o: package_path(o.key) for orders in wanted.values() for o in orders}
    missing = {o: path for o, path in paths.items() if not path.exists()}
    done = len(paths) - len(missing)
    report(done, len(paths))
    compiled = _worker(missing)
    for name, orders in wanted.items():
        while not all(paths[o].exists() for o in orders):
            next(compiled)
            done += 1
            report(done, len(paths))
        native_forms()
        yield name, {o.program.key: load_package(paths[o]) for o in orders}


def native_forms(build: bool = False) -> bool:
    """Load the C++ forms of operators from the private cache; False where it has none.  build: compile them (10 s)."""
    path = _library_path()
    if not path.exists() and not (build and native_library.build(path)):
        return False
    native_library.load(path)
    return True


def _library_path() -> Path:
    """Where the private cache keeps the C++ forms of operators, made from these very sources."""
    found = hashlib.sha256(json.dumps([FORMAT, machine_key()]).encode())
    for source in native_library.files():
        found.update(source.read_bytes())
    return package_path(found.hexdigest()[:32], ".so")


def _worker(missing: Mapping[Order, Path]) -> Iterator[None]:
    """Compile in a child process, which ends with this generator; yields as each package appears."""
    jobs = [
        {
            "graph": graph_file.write_graph(o.program.graph),
            "inputs": [write_form(form) for form in o.forms],
            "path": str(path),
        }
        for o, path in missing.items()
    ]
    with tempfile.TemporaryDirectory(prefix="subquad-") as folder:
        job = Path(folder) / "job.json"
        work = {"threads": torch.get_num_threads(), "library": str(_library_path()), "jobs": jobs}
        job.write_text(json.dumps(work))
        log = Path(folder) / "log"
        with log.open("w") as errors:
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "subquad.compile_worker", str(job)],
                stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder + "/inductor"},
            )  # fmt: skip
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    if line.startswith("done"):
                        yield
                worker.wait()
            finally:
                if worker.poll() is None:
                    worker.terminate()
                    worker.wait()
                worker.stdout.close()
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise CompilationError(
            f"a decoder program could not be compiled ({lines[-1] if lines else worker.returncode})."
        )
