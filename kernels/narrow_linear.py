"""Registers subquad::narrow_linear: a projection of few rows, in C++ inside compiled programs and as F.linear elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

C_DECLARATION = (
    "AOTITorchError aoti_torch_cpu_narrow_linear("
    "AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* result)"
)
DTYPES = (torch.bfloat16, torch.float32)
"""What the C++ form takes; x, weight and bias are of one of them."""


@torch.library.custom_op("subquad::narrow_linear", mutates_args=())
def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed, plus bias [O]: [..., O] in x's dtype.

    The C++ form reads every weight once for up to four rows and sums in fp32: the product of a few rows is bound by reading
    the weights, and library matrix products reach less than half of the memory's rate there in bf16 (measured).
    """
    return F.linear(x, weight, bias)


@narrow_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
