"""Lists the function behind each operator, for callers that need neither gradients nor torch's dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

import subquad.kernels.narrow_linear  # noqa: F401  (registers its operator)
from subquad.kernels.narrow_attention import narrow_attention_torch
from subquad.kernels.prefix_attention import prefix_attention_forward
from subquad.kernels.recurrence_op import recurrence_forward
from subquad.kernels.softmax_op import softmax_attention_forward
from subquad.kernels.wide_linear import wide_linear


def direct() -> dict[OpOverload, Callable[..., Any]]:
    """{operator: function} with the operator's own arguments and outputs; unlike the operators, the functions do without
    torch._dynamo, whose import takes a second.
    """
    return {
        torch.ops.subquad.softmax_attention.default: softmax_attention_forward,
        torch.ops.subquad.prefix_attention.default: prefix_attention_forward,
        torch.ops.subquad.recurrence.default: recurrence_forward,
        torch.ops.subquad.narrow_linear.default: wide_linear,
        torch.ops.subquad.narrow_attention.default: narrow_attention_torch,
        torch.ops.aten.linear.default: wide_linear,
    }
