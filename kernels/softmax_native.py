"""Calls the C++ form of softmax attention of few query rows over stored keys, where it is loaded and fits what is asked."""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.native_code import library
from subquad.kernels.segments import Segment
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.visibility import Predicate, visibility

MOST_ROWS = 2048
"""Query rows of a KV head that read the same keys, up to which the C++ form is the faster one."""
MOST_QUERIES = 16
"""Queries of a row up to which a mask is given to the C++ form pair by pair."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Stored:
    """Keys k [n, N, Hkv, K], v [n, N, Hkv, V] that the query rows first .. first + rows - 1 read.

    reads: the stored row of each of them, int64 [rows]; True where all read stored row 0, None where row n reads row n.
    lengths: int64 [rows] live slots, None for all.  visible: bool [rows, Tq, N], contiguous, None where all are seen.
    """

    k: Tensor
    v: Tensor
    first: int
    rows: int
    reads: Tensor | bool | None = None
    lengths: Tensor | None = None
    visible: Tensor | None = None


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True where the C++ form is loaded and takes these: fp32 or bf16 on the CPU, the numbers of a head side by side."""
    if q.device.type != "cpu" or k.dtype not in DTYPES or v.dtype != k.dtype or q.dtype not in DTYPES:
        return False
    return k.stride(-1) == 1 and v.stride(-1) == 1 and bool(k.shape[-1]) and library() is not None


def stored_segment(q: Tensor, segment: Segment, predicate: Predicate) -> Stored | None:
    """The segment, which has slots, as the C++ form takes it; None where that has no form or is not the faster one."""
    batch, width, heads, _ = q.shape
    rows, stored = segment.rows, segment.k.shape[0]
    if segment.paged or not fits(q, segment.k, segment.v):
        return None
    if rows is not None and rows.numel():
        low, high = (int(x) for x in rows.aminmax())
        if low < 0 or high >= stored:
            raise ValueError(
                f"softmax_attention got a row map that reads row {high if high >= stored else low} of a segment of {stored} rows."
            )
    many = batch * width * heads // segment.k.shape[2] > MOST_ROWS
    if many and (1 if rows is None else int(rows.bincount().max())) * width * heads // segment.k.shape[2] > MOST_ROWS:
        return None
    visible = None
    if not predicate.over(segment)[1]:
        visible = pairs_seen(segment, predicate) if width <= MOST_QUERIES else None
        if visible is None:
            return None
        visible = visible.expand(batch, width, -1).contiguous()
    reads = rows if rows is None or stored > 1 else True
    return Stored(segment.k, segment.v, 0, batch, reads, segment.lengths, visible)


def pairs_seen(segment: Segment, predicate: Predicate) -> Tensor | None:
    """Which slots the mask shows to each query: bool [1 or B, 1 or Tq, N]; None where heads differ."""
    shown = visibility(predicate.mask, predicate.pairs(segment), None)
    return None if shown is None or shown.shape[1] > 1 else shown[:, 0]


def add_stored(q: Tensor, parts: Sequence[Stored], o: Tensor, lse: Tensor, spec: SoftmaxSpec) -> None:
    """Merge the states of q [B, Tq, H, K] over the parts, which fit and are of one dtype, into o [B, Tq, H, V] and
    lse [B, Tq, H], both fp32, contiguous and the caller's own.
    """
    code, first = library(), parts[0]
    assert code is not None
    queries = q.to(torch.float32).contiguous()
    sizes = array.array("q", (*q.shape[:3], first.k.shape[2], q.shape[3], first.v.shape[3]))
    numbers, kept = array.array("q"), [queries]
    for part in parts:
        reads, lengths = part.reads, part.lengths
        if isinstance(reads, Tensor):
            reads = reads.contiguous()
            kept.append(reads)
        if lengths is not None:
            lengths = lengths.contiguous()
            kept.append(lengths)
        k, v = part.k, part.v
        numbers.extend((
            k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3], k.shape[1], part.first, part.rows,
            reads.data_ptr() if isinstance(reads, Tensor) else int(reads is True),
            0 if lengths is None else lengths.data_ptr(), 0 if part.visible is None else part.visible.data_ptr(),
        ))  # fmt: skip
    _function(code)(
        int(first.k.dtype == torch.bfloat16), queries.data_ptr(), o.data_ptr(), lse.data_ptr(), sizes.buffer_info()[0],
        spec.scale, spec.softcap or 0.0, numbers.buffer_info()[0], len(parts),
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _function(code: ctypes.CDLL) -> Any:
    function = code.subquad_softmax_parts
    pointer, number = ctypes.c_void_p, ctypes.c_float
    function.argtypes = [ctypes.c_int32, *[pointer] * 4, number, number, pointer, ctypes.c_int64]
    function.restype = None
    return function
