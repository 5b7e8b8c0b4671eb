"""Launches generated kernels: spec → imported source → launch with arguments by name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from subquad.codegen.cache import load, store
from subquad.codegen.source import arguments, emit
from subquad.ir.kernel_spec import KernelSpec

EVERY_REGISTER = {"maxnreg": 255}
"""The option that lets a thread have all the registers there are."""

_large: set[KernelSpec] = set()


def launch(spec: KernelSpec, values: dict[str, Any], grid: tuple[int, ...]) -> None:
    """Run the kernel of `spec` on `values` by argument name; an empty grid runs nothing."""
    if not all(grid):
        return
    function, names = _imported(spec)
    extra = EVERY_REGISTER if spec in _large else {}
    made = function[grid](
        *(values[name] for name in names), num_warps=spec.num_warps, num_stages=spec.num_stages, **extra
    )
    if spec.target.startswith("cuda") and spilled_early(getattr(made, "n_regs", None), getattr(made, "n_spills", None)):
        _large.add(spec)


def spilled_early(registers: int | None, spills: int | None) -> bool:
    """True for a kernel that was made to spill although a thread may have more registers: the assembler wanted one more
    program per processor. Such a kernel is built again, with EVERY_REGISTER.
    """
    return bool(spills) and registers is not None and registers < 255


@functools.lru_cache(maxsize=1024)
def _imported(spec: KernelSpec) -> tuple[Any, tuple[str, ...]]:
    path = store(emit(spec), f"{spec.op}_{spec.part}")
    return load(path).kernel, tuple(name for name, _ in arguments(spec))


def target_of(tensor: Tensor) -> str:
    """The build target of the device a tensor is on; a CPU tensor (Triton's interpreter) counts as cuda:90."""
    if tensor.device.type != "cuda":
        return "cuda:90"
    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(tensor.device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"cuda:{major}{minor}"


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the device a tensor is on; 1 under the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def dtype_name(tensor: Tensor) -> str:
    """ "float32", "float16", "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")
