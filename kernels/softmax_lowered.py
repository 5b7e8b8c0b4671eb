"""Chooses the traceable form that stands for softmax attention in a compiled program; where none is right the operator stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.segments import check, segments
from subquad.kernels.sizes import surely
from subquad.kernels.softmax_torch import compute_dtype, finish, softmax_attention_torch
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.visibility import CAUSAL

DENSE_ROWS = 512
"""Query rows up to which the form may hold the scores of all its queries and keys."""


def softmax_attention_lowered(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
    q_positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    operands: Sequence[Tensor],
    scalars: Sequence[int],
    spec: str,
) -> tuple[Tensor, Tensor]:
    """The operator subquad::softmax_attention for a program with symbolic sizes, or NotImplemented.

    Few queries: all scores at once, a segment that is stored once read once for all rows. Many: the library's kernel
    where its causal mask, or none, is the mask. The operator stays for row maps of several stored rows, whose sharing only
    values show, for page lists, and for many queries under other masks, so that nothing is copied out per row and memory is
    O(T).
    """
    what = SoftmaxSpec.parse(spec)
    check(q, k, v, rows, lengths, positions)
    parts = segments(k, v, rows, lengths, positions)
    if any(part.rows is not None and not part.shared_by_all for part in parts):
        return NotImplemented
    if surely(q.shape[1] <= DENSE_ROWS):
        return softmax_attention_torch(
            q, k, v, rows, lengths, positions, q_positions, bias, sinks, operands, scalars, spec
        )
    key, value = k[0], v[0]
    plain = len(k) == 1 and not rows and not lengths and bias is None and what.softcap is None
    alike = key.shape[3] == value.shape[3] and q.dtype == key.dtype == value.dtype and q.device.type == "cpu"
    causal = what.mask in CAUSAL and not positions and q_positions is None and surely(q.shape[1] == key.shape[1])
    if not (plain and alike and (causal or what.mask is None) and surely(key.shape[1] >= 1)):
        return NotImplemented
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, key, value)), 0.0, causal, scale=what.scale
    )
    o, lse = finish(o.transpose(1, 2), lse.transpose(1, 2).to(compute_dtype(q)), parts, sinks, what)
    return o.to(q.dtype), lse
