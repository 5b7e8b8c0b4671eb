"""Offers generated kernels to the operators: picks the calls they compute, and trusts a kernel only after its own check."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch

from subquad.codegen import recurrence_call, softmax_call, tuned
from subquad.codegen.schedule import Schedule, recurrence_candidates, softmax_candidates
from subquad.codegen.self_check import TOLERANCE, recurrence_error, softmax_error

_trusted: dict[tuple[Any, ...], bool] = {}


def provider(operator: str, given: dict[str, Any]) -> Any:
    """Outputs of "softmax_attention" or "recurrence" for arguments by name, or gradients of "<operator>_backward" (with
    `grads` beside them), by generated kernels; None where there is no kernel that has proved right.
    """
    q = given["q"]
    if q.device.type != "cuda" or q.dtype not in TOLERANCE or not importlib.util.find_spec("triton"):
        return None
    grads = given.get("grads")
    arguments = {name: value for name, value in given.items() if name != "grads"}
    if operator.startswith("recurrence"):
        if not recurrence_call.runs(arguments) or not _trust("recurrence", arguments):
            return None
        _settle_recurrence(arguments, grads)
        if grads is None:
            return recurrence_call.recurrence_forward(arguments)
        return recurrence_call.recurrence_backward(arguments, grads)
    if not softmax_call.runs(arguments) or not _trust("softmax_attention", arguments):
        return None
    _settle_softmax(arguments, grads)
    if grads is None:
        return softmax_call.softmax_forward(arguments)
    return softmax_call.softmax_backward(arguments, *grads)


def _settle_recurrence(given: dict[str, Any], grads: Any) -> None:
    """Measure the schedules of this call's kernels, unless they were measured on this device before."""
    spec = recurrence_call.base_spec(given, gradients=grads is not None)

    def run(schedule: Schedule) -> None:
        if grads is None:
            recurrence_call.recurrence_forward(given, schedule)
        else:
            recurrence_call.recurrence_backward(given, grads, schedule)

    tuned.settle(spec, given["q"].shape[0] * given["q"].shape[1], lambda: recurrence_candidates(spec), run)


def _settle_softmax(given: dict[str, Any], grads: Any) -> None:
    """The same for softmax attention."""
    spec = softmax_call.base_spec(given, "forward" if grads is None else "grad_keys")
    batch, length, heads, _ = given["q"].shape
    tile = length * heads // given["k"][0].shape[2]

    def run(schedule: Schedule) -> None:
        if grads is None:
            softmax_call.softmax_forward(given, schedule)
        else:
            grad_o, grad_lse, o, lse, bias_too = grads
            softmax_call.softmax_backward(given, grad_o, grad_lse, o, lse, bias_too, schedule)

    rows = batch * length if tile > 16 else 0
    tuned.settle(spec, rows, lambda: softmax_candidates(spec, tile), run)


def _trust(operator: str, given: dict[str, Any]) -> bool:
    """Check forward and gradients once per device, dtype, spec and head sizes against the fp64 reference; on failure warn
    and never use the kernels.
    """
    q = given["q"]
    device, dtype = q.device, q.dtype
    if operator == "softmax_attention":
        sizes: tuple[int, ...] = (q.shape[3], given["v"][0].shape[3])
    else:
        weights = given["feature_q"]
        sizes = (q.shape[3], given["v"].shape[3], weights[0].shape[-1] if weights else 0)
    key = (operator, device, dtype, given["spec"], sizes)
    if key not in _trusted:
        check = softmax_error if operator == "softmax_attention" else recurrence_error
        try:
            error = check(device, dtype, given["spec"], *sizes)
            problem = "" if error <= TOLERANCE[dtype] else f"differs from the fp64 reference by {error:.1e} in {dtype}"
        except Exception as failure:  # a compiler or driver may raise anything
            problem = (
                f"failed with {type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
            )
        _trusted[key] = not problem
        if problem:
            import triton

            warnings.warn(
                f"The generated {operator} kernels are not used on {torch.cuda.get_device_name(device)} with triton "
                f"{triton.__version__}, the torch form is: their self-check {problem}.",
                stacklevel=2,
            )
    return _trusted[key]
