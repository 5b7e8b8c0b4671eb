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

from subquad.application import original_forward, rewritten
from subquad.estimated_error import allowed_error, errors_of_many, relative_error
from subquad.redrawn_inputs import redrawn

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
    return outputs_of(model, inputs_of(model, kind, *case), double)


def outputs_of(model: nn.Module, inputs: dict[str, Any], double: bool = False) -> list[torch.Tensor]:
    """Every floating tensor that the model returns for these inputs."""
    with torch.no_grad():
        if not double:
            return floating(call(model, inputs))
        wide_model = copy.deepcopy(model).double()  # outside the mode, which would walk deepcopy's memo at every tensor
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            wide = {
                k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
            }
            with Widened():
                return floating(call(wide_model, wide))
        finally:
            torch.set_default_dtype(default)


class Reference:
    """What a model gives before a rewrite, and in float64, for every case; of a model that is rewritten, on further inputs too.

    own: per output the original's own error, the largest over the cases: one case may be exact by luck.  Where a model
    cannot run in float64 the original stands for it, with an error of four units in the last place.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.model, self.kind = model, kind
        self.cases = cases(model, kind)
        self.before = {case: outputs(model, kind, case) for case in self.cases}
        self.judge = {case: self._judged(case) for case in self.cases}
        self.own = [max(self._own(case, n) for case in self.cases) for n in range(len(self.before[self.cases[0]]))]

    def _judged(self, case: Case) -> list[torch.Tensor]:
        """The float64 outputs, and the original's where there is none."""
        before = self.before[case]
        try:
            wide = outputs(self.model, self.kind, case, double=True)
        except Exception:
            return before
        if [x.shape for x in wide] != [x.shape for x in before]:
            return before
        return [w if math.isfinite(relative_error(b, w)) else b for b, w in zip(before, wide, strict=True)]

    def _own(self, case: Case, place: int) -> float:
        before, judge = self.before[case][place], self.judge[case][place]
        if before.numel() == 0:
            return 0.0
        return 4 * torch.finfo(before.dtype).eps if judge is before else relative_error(before, judge)

    def broken(self, case: Case, after: list[torch.Tensor]) -> str:
        """What breaks the EXACT contract, "" when it is kept; all positions count, padding too, and NaN stays NaN.

        An error above the bound that few rows make up is decided on further inputs.
        """
        before = self.before[case]
        if [x.shape for x in after] != [x.shape for x in before]:
            return f"outputs of {[tuple(x.shape) for x in after]} instead of {[tuple(x.shape) for x in before]}"
        for place, (judge, now) in enumerate(zip(self.judge[case], after, strict=True)):
            if now.numel() == 0:
                continue
            error, own, dtype = relative_error(now, judge), self.own[place], before[place].dtype
            if not error <= allowed_error(own, dtype) and rewritten(self.model) and judge is not before[place]:
                error, own = errors_of_many(
                    (judge, before[place], now), lambda n, place=place: self._further(case, n, place)
                )
            if not error <= (allowed := allowed_error(own, dtype)):
                return f"output {place}: error {error:.2e}, allowed {allowed:.2e}, original's own {own:.2e}"
        return ""

    def _further(self, case: Case, draw: int, place: int) -> list[torch.Tensor]:
        """An output in float64, by the original and by the rewritten model, for other inputs of the same kind."""
        given = inputs_of(self.model, self.kind, *case)
        given |= redrawn({name: value for name, value in given.items() if isinstance(value, torch.Tensor)}, draw)
        after = outputs_of(self.model, given)[place]
        with original_forward(self.model):
            return [outputs_of(self.model, given, double=True)[place], outputs_of(self.model, given)[place], after]


def floating(output: Any) -> list[torch.Tensor]:
    """Every floating tensor of a model's output, in order."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
