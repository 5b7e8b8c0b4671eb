"""Runs softmax attention on CPU: every segment by the form that is fastest for its size, mask and sharing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.segments import Segment, check, segments
from subquad.kernels.sharing import Run, runs
from subquad.kernels.softmax_partial import partial
from subquad.kernels.softmax_torch import compute_dtype, finish
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.state import merge
from subquad.kernels.visibility import CAUSAL, DENSE_PAIRS, Predicate, per_head, visibility

BLOCK = 128
"""Query rows and slots of a block of the block-wise form."""


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
    for whole in parts if q.numel() else []:
        for part in visible_parts(trimmed(whole), predicate):
            found = segment_state(q, part, what, predicate, slots_of(bias, part))
            if found is not None:
                state = found if state is None else merge(state[0].to(state[1].dtype), state[1], *found)
    if state is None:
        o, lse = q.new_zeros(batch, q_len, heads, v[0].shape[3]), q.new_full((batch, q_len, heads), -torch.inf)
        state = o, lse.to(compute_dtype(q))
    o, lse = finish(*state, parts, sinks, what)
    return o.to(q.dtype), lse


def visible_parts(segment: Segment, predicate: Predicate) -> list[Segment]:
    """The segment, or where a few queries see a long past and differ only in its last slots, past and last slots apart."""
    if not segment.count:
        return []
    cut = (segment.count - predicate.q_len) // BLOCK * BLOCK - BLOCK
    few = predicate.q_len == 1 or predicate.batch * predicate.q_len * segment.count < DENSE_PAIRS
    if predicate.mask is None or few or cut < predicate.q_len or segment.paged:
        return [segment]
    past = segment.cut(cut)
    low = None if segment.lengths is None else int(segment.lengths.min())
    if predicate.over(segment)[1] or not predicate.over(past)[1] or (low is not None and low < cut):
        return [segment]
    return [past.all_live(), segment.rest(cut)]


def trimmed(segment: Segment) -> Segment:
    """The segment cut to its longest live length; without lengths where all rows have that one."""
    if segment.lengths is None or segment.lengths.numel() == 0:
        return segment
    low, high = (int(x) for x in torch.aminmax(segment.lengths))
    segment = segment if high >= segment.count else segment.cut(high)
    return segment.all_live() if low >= segment.count else segment


def slots_of(bias: Tensor | None, segment: Segment) -> Tensor | None:
    """The part of a bias [.., 1 or all slots] that falls on one segment."""
    return bias if bias is None or bias.shape[3] == 1 else bias.narrow(3, segment.first, segment.count)


def segment_state(
    q: Tensor, segment: Segment, spec: SoftmaxSpec, predicate: Predicate, bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The state (o [B, Tq, H, V], lse [B, Tq, H]) of a segment with at least one slot; None where nothing is visible."""
    maybe, always = predicate.over(segment)
    if not maybe:
        return None
    live = segment.live()
    seen = None if live is None else per_head(live, q.shape[2])
    if segment.paged:
        k, v = segment.gathered()
        groups = runs(None, q.shape[0])
    else:
        k, v = segment.k, segment.v
        groups = runs(segment.rows, q.shape[0])
    if always:
        return _by_run(q, k, v, groups, spec, seen, bias)
    if seen is None and bias is None and is_causal(predicate, segment):
        return _by_run(q, k, v, groups, spec, None, None, causal=True)
    env = predicate.pairs(segment)
    if q.shape[1] == 1 or q.shape[1] * segment.count <= DENSE_PAIRS:
        visible = visibility(predicate.mask, env, seen)
        assert visible is not None
        return _by_run(q, k, v, groups, spec, None if bool(visible.all()) else visible, bias)
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    for rows, slots, visible in blocks(predicate, env, seen, segment.count):
        if not slots:
            o[:, rows], lse[:, rows] = 0.0, -torch.inf
            continue
        local = bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]
        local = local if local is None or local.shape[3] == 1 else take(local, slots, 3)
        key, value = take(k, slots, 1), take(v, slots, 1)
        o[:, rows], lse[:, rows] = _by_run(q[:, rows], key, value, groups, spec, visible, local)
    return o, lse


def is_causal(predicate: Predicate, segment: Segment) -> bool:
    """Whether the library's top-left causal mask is the mask of this segment."""
    plain = predicate.q_positions is None and segment.places is None and predicate.q_len == segment.count
    return predicate.mask in CAUSAL and plain and not isinstance(segment.base, Tensor) and segment.base == 0


def blocks(
    predicate: Predicate, env: dict[str, Any], seen: Tensor | None, count: int
) -> list[tuple[slice, list[slice], Tensor | None]]:
    """(query rows, runs of slots that they may see, visible pairs [1 or B, 1 or H, rows, slots of the runs] or None for
    all) of every block of query rows; env: of Predicate.pairs.
    """
    maybe, always = predicate.blocks(env, BLOCK)
    found = []
    for index in range(maybe.shape[0]):
        rows = slice(index * BLOCK, min(predicate.q_len, (index + 1) * BLOCK))
        slots = _runs_of(maybe[index].tolist(), count)
        visible = None
        if slots and (seen is not None or not bool(always[index][maybe[index]].all())):
            local = {name: value[:, :, rows] if name in ("q", "i") else value for name, value in env.items()}
            local |= {name: take(local[name], slots, 3) for name in ("kv", "j") if name in local}
            visible = visibility(predicate.mask, local, None if seen is None else take(seen, slots, 3))
        found.append((rows, slots, visible))
    return found


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


def _runs_of(touched: list[bool], length: int) -> list[slice]:
    found: list[slice] = []
    for block, touch in enumerate(touched):
        if not touch:
            continue
        start, stop = block * BLOCK, min(length, (block + 1) * BLOCK)
        if found and found[-1].stop == start:
            found[-1] = slice(found[-1].start, stop)
        else:
            found.append(slice(start, stop))
    return found


def take(tensor: Tensor, slots: list[slice], dim: int) -> Tensor:
    """The slots of `tensor` along `dim`, runs side by side; a view where there is one run."""
    parts = [tensor.narrow(dim, run.start, run.stop - run.start) for run in slots]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
