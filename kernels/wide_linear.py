"""A projection of many rows: in fp32 where the processor has no bf16 products, otherwise the library's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 4
"""Rows up to which converting the weight costs more than it saves."""


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed, plus bias [O]: [..., O] in x's dtype.

    On a CPU without bf16 instructions torch multiplies bf16 matrices three to seven times slower than it converts them and
    multiplies in fp32 (measured at 46 and 512 rows).
    """
    many = x.numel() > FEW * x.shape[-1]
    return in_fp32(x, weight, bias) if many and better_in_fp32(x) else F.linear(x, weight, bias)


def better_in_fp32(x: Tensor) -> bool:
    """True for bf16 on a CPU without bf16 instructions."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The projection in fp32, rounded to x's dtype at the end; traceable."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
