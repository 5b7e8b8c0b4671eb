"""The EXACT contract on whole models: every output of a rewritten model against a float64 run of the original."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from zoo import call
from zoo_inputs import PADDINGS, SIZES, inputs_of, takes_padding

from subquad.site_oracle import allowed_error, relative_error

Case = tuple[int, str]
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Widened(TorchFunctionMode):
    """Inside the block every cast to a narrower floating type becomes one to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        args, kwargs = pytree.tree_map_only(torch.dtype, _widen, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widen(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in _NARROW else dtype


def cases(model: nn.Module, kind: str) -> list[Case]:
    """The sizes and paddings that a model is tried with: two sizes, and none, left and right padding for text."""
    padded = takes_padding(inputs_of(model, kind))
    return [(size, padding) for size in range(len(SIZES)) for padding in (PADDINGS if padded else ("none",))]


def outputs(model: nn.Module, kind: str, case: Case, double: bool = False) -> list[torch.Tensor]:
    """Every floating tensor that the model returns for a case."""
    inputs = inputs_of(model, kind, *case)
    with torch.no_grad():
        if not double:
            return floating(call(model, inputs))
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            wide = {
                k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
            }
            with Widened():
                return floating(call(copy.deepcopy(model).double(), wide))
        finally:
            torch.set_default_dtype(default)


def broken(original: list[torch.Tensor], judge: list[torch.Tensor] | None, after: list[torch.Tensor]) -> str:
    """What breaks the contract, "" when it is kept.

    Without a float64 run the original stands for it, and its own error is taken to be one unit in the last place.
    Positions where the original is NaN have to be NaN afterwards.
    """
    if len(original) != len(after):
        return f"{len(after)} outputs instead of {len(original)}"
    judges = judge if judge is not None and len(judge) == len(original) else [None] * len(original)
    for place, (before, wide, now) in enumerate(zip(original, judges, after, strict=True)):
        if before.shape != now.shape:
            return f"output {place} has shape {tuple(now.shape)} instead of {tuple(before.shape)}"
        if before.numel() == 0:
            continue
        if wide is None or wide.shape != before.shape or not math.isfinite(relative_error(before, wide)):
            wide, own = before, 4 * torch.finfo(before.dtype).eps
        else:
            own = relative_error(before, wide)
        error, allowed = relative_error(now, wide), allowed_error(own, before.dtype)
        if not error <= allowed:
            return f"output {place}: error {error:.2e}, allowed {allowed:.2e}, original's own {own:.2e}"
    return ""


def floating(output: Any) -> list[torch.Tensor]:
    """Every floating tensor of a model's output, in order."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
