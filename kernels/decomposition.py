"""Lists the traceable torch form of each operator, for Inductor and run_decompositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from subquad.kernels.recurrence_forms import recurrence_torch
from subquad.kernels.softmax_lowered import softmax_attention_lowered


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Decomposition table {operator: torch form}; the forms keep sizes symbolic, and keep the operator where they have
    no form.
    """
    return {
        torch.ops.subquad.softmax_attention.default: softmax_attention_lowered,
        torch.ops.subquad.recurrence.default: recurrence_torch,
    }
