"""Turns a KernelSpec into the text of one Triton source file."""

from __future__ import annotations

from subquad.codegen import recurrence_template, softmax_template
from subquad.codegen.text import Argument
from subquad.ir.kernel_spec import KernelSpec

_TEMPLATES = {"softmax_attention": softmax_template, "recurrence": recurrence_template}


def emit(kernel_spec: KernelSpec) -> str:
    """Triton source of the kernel, readable and complete; equal specs give equal text. Raises ValueError for what has
    no template.
    """
    return _TEMPLATES[kernel_spec.op].source(kernel_spec)


def arguments(kernel_spec: KernelSpec) -> list[Argument]:
    """(name, Triton type) of each argument of the emitted function `kernel`, in order."""
    return _TEMPLATES[kernel_spec.op].arguments(kernel_spec)
