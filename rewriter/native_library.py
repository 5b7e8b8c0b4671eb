"""Builds the C++ forms of operators with the compiler that Inductor uses, and makes them known to the process."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import torch

from subquad.kernels.native_code import SOURCES, provide_library

FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC")


def files() -> tuple[Path, ...]:
    """The sources of the library and their headers."""
    return (*SOURCES, *sorted(SOURCES[0].parent.glob("*.h")))


def build(target: Path) -> bool:
    """Compile the library into `target`, which appears whole or not at all; False when the compiler cannot."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    home = Path(torch.__file__).parent
    fresh = target.with_suffix(f".{os.getpid()}.partial")
    try:
        done = subprocess.run(
            [
                get_cpp_compiler(), *FLAGS, f"-I{home / 'include'}", *map(str, SOURCES), "-o", str(fresh),
                f"-L{home / 'lib'}", "-ltorch_cpu",
            ],
            capture_output=True,
        )  # fmt: skip
        if done.returncode == 0:
            os.replace(fresh, target)
    except (OSError, RuntimeError):
        return False
    finally:
        fresh.unlink(missing_ok=True)
    return target.exists()


def load(path: Path) -> None:
    """Make the library's symbols visible to the compiled programs that call it, and to operators run one by one."""
    provide_library(ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL | os.RTLD_NOW))
