"""Calls the C++ form of prefix attention where there is one for what is asked."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.native_code import library
from subquad.kernels.spec import SoftmaxSpec

MOST_ROWS = 2048
"""Query rows of a KV head below a node up to which the C++ form is the faster one."""
DTYPES = (torch.float32, torch.bfloat16)


def prefix_attention_native(
    q: Tensor, k: Tensor, v: Tensor, nodes: Tensor, o: Tensor, lse: Tensor, spec: SoftmaxSpec
) -> bool:
    """Merge the nodes' states into o [B, Tq, H, V] and lse [B, Tq, H], both fp32, contiguous and the caller's own; False where
    the library is not there or has no form for these arguments, which are those of prefix_attention.
    """
    found = library()
    width, heads, (kv_heads, dim), out = q.shape[1], q.shape[2], k.shape[1:], v.shape[2]
    if found is None or spec.mask is not None or spec.softcap is not None or q.device.type != "cpu" or not len(nodes):
        return False
    if k.dtype not in DTYPES or v.dtype != k.dtype or o.dtype != torch.float32 or lse.dtype != torch.float32:
        return False
    if k.stride(2) != 1 or v.stride(2) != 1 or int(nodes[:, 4].max()) * width * heads // kv_heads > MOST_ROWS:
        return False
    queries, table = q.to(torch.float32).contiguous(), nodes.contiguous()
    numbers = (width, heads, kv_heads, dim, out, k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    sizes = (ctypes.c_int64 * len(numbers))(*numbers)
    _function(found)(
        int(k.dtype == torch.bfloat16), queries.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr(),
        ctypes.addressof(sizes), spec.scale, table.data_ptr(), len(table),
    )  # fmt: skip
    return True


@functools.lru_cache(maxsize=1)
def _function(found: ctypes.CDLL) -> Any:
    function = found.subquad_prefix_attention
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_int32, *[pointer] * 6, ctypes.c_float, pointer, ctypes.c_int64]
    function.restype = None
    return function
