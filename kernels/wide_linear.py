"""A projection outside compiled programs: few rows in C++, many in fp32 where the processor has no bf16 products."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.narrow_linear import DTYPES
from subquad.kernels.native_code import library

FEW = 4
"""Rows up to which converting the weight costs more than it saves."""
NARROW = 64
"""Rows up to which the C++ form, which reads every weight once, is the faster one (SmolLM2 on two cores: 1.4 times in fp32 at
32 rows, 1.1 at 64; several times in bf16)."""


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed, plus bias [O]: [..., O] in x's dtype.

    On a CPU without bf16 instructions torch multiplies bf16 matrices three to seven times slower than it converts them and
    multiplies in fp32 (measured at 46 and 512 rows).  Up to NARROW rows the C++ form of narrow_linear serves once it is loaded.
    """
    if x.numel() <= NARROW * x.shape[-1] and (found := _narrow(x, weight, bias)) is not None:
        return found
    many = x.numel() > FEW * x.shape[-1]
    return in_fp32(x, weight, bias) if many and better_in_fp32(x) else F.linear(x, weight, bias)


def better_in_fp32(x: Tensor) -> bool:
    """True for bf16 on a CPU without bf16 instructions."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The projection in fp32, rounded to x's dtype at the end; traceable."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The projection in C++, None where the library is not there or has no form for these tensors."""
    code = library()
    if code is None or x.device.type != "cpu" or x.dtype not in DTYPES or weight.dtype != x.dtype or not x.numel():
        return None
    if not weight.is_contiguous() or (bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous())):
        return None
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = x.new_empty(rows.shape[0], weight.shape[0])
    _function(code)(
        int(x.dtype == torch.bfloat16), rows.data_ptr(), rows.stride(0), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(), *rows.shape, weight.shape[0],
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])


@functools.lru_cache(maxsize=1)
def _function(code: ctypes.CDLL) -> Any:
    function = code.subquad_narrow_linear
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int32, pointer, number, pointer, pointer, pointer, number, number, number]
    function.restype = None
    return function
