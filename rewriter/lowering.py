"""Replace the operators of a program by their traceable torch forms, which the compiler sees through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.decomposition import decompositions
from subquad.kernels.wide_linear import better_in_fp32, in_fp32


def lower(graph: torch.fx.Graph) -> None:
    """Lower a graph in place by the decomposition table; an operator without a form for its arguments stays.

    Projections of bf16 become products in fp32 where the processor has none in bf16.
    """
    for operator, form in decompositions().items():
        lowered = _lowered(operator, form)
        for node in graph.find_nodes(op="call_function", target=operator):
            node.target = lowered
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.target = _projection


def _projection(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return in_fp32(x, weight, bias) if better_in_fp32(x) else F.linear(x, weight, bias)


def _lowered(operator: Callable[..., Any], form: Callable[..., Any]) -> Callable[..., Any]:
    def lowered(*arguments: Any) -> Any:
        found = form(*arguments)
        return operator(*arguments) if found is NotImplemented else found

    return lowered
