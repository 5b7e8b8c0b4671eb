"""The places of the largest numbers of rows as long as a vocabulary, found without sorting them."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.native_code import library

GROUP = 128
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers whose order is that of positive numbers with the same bits; a processor compares them several times as fast."""
NATIVE = (torch.float32, torch.bfloat16)


def top_tokens(logits: Tensor, count: int) -> Tensor:
    """Ids int64 [n, min(count, V)] of the largest logits [n, V], largest first.

    The C++ form reads the logits once and gives equal ones in ascending order.  Without it, only those groups are searched
    that have the largest maxima: the largest `count` elements lie in `count` of them.
    """
    found = _native(logits, count)
    return _grouped(logits, count) if found is None else found


def first_largest(scores: Tensor) -> int | None:
    """The first place of the largest of scores [1, V]; None where one of them is NaN."""
    found = _native(scores, 1)
    if found is not None:
        return int(found)
    if bool(scores.max().isnan()):
        return None
    return int(scores.argmax(-1))


def _native(rows: Tensor, count: int) -> Tensor | None:
    """What the C++ form finds; None where it is not loaded, does not take these rows, or a row holds NaN."""
    if rows.dtype not in NATIVE or rows.device.type != "cpu" or rows.stride(1) != 1 or not rows.numel():
        return None
    code = library()
    if code is None:
        return None
    number, vocabulary = rows.shape
    wanted = min(count, vocabulary)
    ids = torch.empty(number, wanted, dtype=torch.int64)
    whole = _function(code)(
        rows.dtype == torch.bfloat16, rows.data_ptr(), number, rows.stride(0), vocabulary, wanted, ids.data_ptr()
    )
    return ids if whole else None


@functools.lru_cache(maxsize=1)
def _function(code: ctypes.CDLL) -> Any:
    function = code.subquad_largest
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int32, pointer, number, number, number, number, pointer]
    function.restype = ctypes.c_int32
    return function


def _grouped(logits: Tensor, count: int) -> Tensor:
    rows, vocabulary = logits.shape
    groups = vocabulary // GROUP
    if groups <= 2 * count or logits.stride(1) != 1 or rows == 0:
        return logits.topk(min(count, vocabulary), -1).indices
    bits = logits.view(BITS[logits.dtype])
    best = bits[:, : groups * GROUP].view(rows, GROUP, groups).amax(1).topk(count, -1).indices
    steps = torch.arange(0, groups * GROUP, groups, device=logits.device)
    places = (best[:, :, None] + steps).flatten(1)
    if vocabulary % GROUP:
        rest = torch.arange(groups * GROUP, vocabulary, device=logits.device)
        places = torch.cat([places, rest.expand(rows, -1)], 1)
    found = bits.gather(1, places).topk(count, -1)
    if int(found.values.min()) <= 0:  # the bits of negative numbers are ordered the other way
        return logits.topk(count, -1).indices
    return places.gather(1, found.indices)
