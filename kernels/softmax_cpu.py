"""Runs softmax attention on CPU: every segment by the form that is fastest for its size, mask and sharing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.segments import Segment, check, segments
from subquad.kernels.sharing import Run, runs
from subquad.kernels.softmax_native import Stored, add_stored, stored_segment
from subquad.kernels.softmax_partial import partial
from subquad.kernels.softmax_pieces import pieces, slots_of, take, trimmed, visible_parts
from subquad.kernels.softmax_torch import compute_dtype, finish
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.state import merge
from subquad.kernels.visibility import Predicate


def softmax_attention_cpu(
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
    """The operator subquad::softmax_attention on CPU: a partial state per segment, merged.

    Not traceable, since it looks at sizes and values.
    """
    what = SoftmaxSpec.parse(spec)
    check(q, k, v, rows, lengths, positions)
    batch, q_len, heads, _ = q.shape
    predicate = Predicate(what.mask, batch, heads, q_len, q_positions, operands, scalars)
    parts = segments(k, v, rows, lengths, positions)
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    state: tuple[Tensor, Tensor] | None = None
    native: list[Stored] = []
    for whole in parts if q.numel() else []:
        for part in visible_parts(trimmed(whole), predicate):
            stored = stored_segment(q, part, predicate) if bias is None else None
            if stored is not None and (not native or native[0].k.dtype == stored.k.dtype):
                native.append(stored)
                continue
            found = segment_state(q, part, what, predicate, slots_of(bias, part))
            if found is not None:
                state = found if state is None else merge(state[0].to(state[1].dtype), state[1], *found)
    if native and state is not None:
        state = state[0].to(torch.float32).contiguous(), state[1].to(torch.float32).contiguous()
    if state is None:
        dtype = torch.float32 if native else q.dtype
        state = torch.zeros(batch, q_len, heads, v[0].shape[3], dtype=dtype), _nothing(q)
    if native:
        add_stored(q, native, *state, what)
    o, lse = finish(*state, parts, sinks, what)
    return o.to(q.dtype), lse


def segment_state(
    q: Tensor, segment: Segment, spec: SoftmaxSpec, predicate: Predicate, bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The state (o [B, Tq, H, V], lse [B, Tq, H]) of a segment with at least one slot; None where nothing is visible."""
    k, v = segment.gathered() if segment.paged else (segment.k, segment.v)
    groups = runs(None if segment.paged else segment.rows, q.shape[0])
    state: tuple[Tensor, Tensor] | None = None
    for piece in pieces(segment, predicate, spec.softcap is None and bias is None):
        found = None
        if piece.slots:
            local = bias if bias is None or bias.shape[2] == 1 else bias[:, :, piece.rows]
            local = local if local is None or local.shape[3] == 1 else take(local, piece.slots, 3)
            key, value = take(k, piece.slots, 1), take(v, piece.slots, 1)
            found = _by_run(q[:, piece.rows], key, value, groups, spec, piece.visible, local, piece.causal)
        if found is not None and piece.rows == slice(0, q.shape[1]):
            return found
        if state is None:
            state = q.new_zeros(*q.shape[:3], v.shape[3]), _nothing(q)
        if found is not None:
            state[0][:, piece.rows], state[1][:, piece.rows] = found
    return state


def _nothing(q: Tensor) -> Tensor:
    """The lse [B, Tq, H] of rows that see no key."""
    return torch.full(q.shape[:3], -torch.inf, dtype=compute_dtype(q), device=q.device)


def _by_run(
    q: Tensor, k: Tensor, v: Tensor, groups: list[Run], spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The partial state over stored rows, the query rows of each run in one product."""
    if len(groups) == 1 and groups[0].order is None:
        run = groups[0]
        return partial(q, run.of(k), run.of(v), spec, visible, bias, causal)
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    for run in groups:
        shown, added = (None if x is None else run.queries(x) for x in (visible, bias))
        found = partial(run.queries(q), run.of(k), run.of(v), spec, shown, added, causal)
        if run.order is None:
            return found
        o[run.order], lse[run.order] = found[0].to(o.dtype), found[1].to(lse.dtype)
    return o, lse
