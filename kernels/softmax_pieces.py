"""Cuts the pairs of queries and slots of a segment into pieces that one product computes, leaving out what the mask hides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.kernels.segments import Segment
from subquad.kernels.visibility import CAUSAL, DENSE_PAIRS, Predicate, per_head, visibility

BLOCK = 128
"""Query rows and slots of a block."""


@dataclass(frozen=True)
class Piece:
    """Query rows `rows` over runs of slots; visible [1 or B, 1 or H, rows, slots of the runs side by side] or None for all.

    causal: the top-left causal mask in place of `visible`. No runs: the rows see nothing.
    """

    rows: slice
    slots: tuple[slice, ...]
    visible: Tensor | None
    causal: bool = False


def pieces(segment: Segment, predicate: Predicate, library: bool) -> Iterator[Piece]:
    """Pieces that cover each query row once; none where nothing of the segment is visible. The segment has slots.

    library: scores are plain enough for the library's own causal mask.
    """
    maybe, always = predicate.over(segment)
    if not maybe:
        return
    live = segment.live()
    if live is not None and segment.paged and bool(live.all()):
        live = None
    seen = None if live is None else per_head(live, predicate.heads)
    queries, slots = slice(0, predicate.q_len), (slice(0, segment.count),)
    if always:
        yield Piece(queries, slots, seen)
    elif library and seen is None and _is_causal(segment, predicate):
        yield Piece(queries, slots, None, causal=True)
    elif predicate.q_len == 1 or predicate.q_len * segment.count <= DENSE_PAIRS:
        visible = visibility(predicate.mask, predicate.pairs(segment), seen)
        assert visible is not None
        yield Piece(queries, slots, None if bool(visible.all()) else visible)
    else:
        yield from _blocks(segment, predicate, seen)


def visible_parts(segment: Segment, predicate: Predicate) -> list[Segment]:
    """The segment, or past and last slots apart where many pairs differ only in the last slots; nothing without slots."""
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


def _is_causal(segment: Segment, predicate: Predicate) -> bool:
    """Whether the library's top-left causal mask is the mask of this segment."""
    plain = predicate.q_positions is None and segment.places is None and segment.rows is None
    same = predicate.q_len == segment.count and not isinstance(segment.base, Tensor) and segment.base == 0
    return predicate.mask in CAUSAL and plain and same


def _blocks(segment: Segment, predicate: Predicate, seen: Tensor | None) -> Iterator[Piece]:
    """A piece per block of query rows, with the blocks of slots that some row of it may see."""
    env = predicate.pairs(segment)
    maybe, always = predicate.blocks(env, BLOCK)
    for index in range(maybe.shape[0]):
        rows = slice(index * BLOCK, min(predicate.q_len, (index + 1) * BLOCK))
        slots = _runs_of(maybe[index].tolist(), segment.count)
        visible = None
        if slots and (seen is not None or not bool(always[index][maybe[index]].all())):
            local = {name: value[:, :, rows] if name in ("q", "i") else value for name, value in env.items()}
            local |= {name: take(local[name], slots, 3) for name in ("kv", "j") if name in local}
            visible = visibility(predicate.mask, local, None if seen is None else take(seen, slots, 3))
        yield Piece(rows, slots, visible)


def _runs_of(touched: list[bool], length: int) -> tuple[slice, ...]:
    found: list[slice] = []
    for block, touch in enumerate(touched):
        if not touch:
            continue
        start, stop = block * BLOCK, min(length, (block + 1) * BLOCK)
        if found and found[-1].stop == start:
            found[-1] = slice(found[-1].start, stop)
        else:
            found.append(slice(start, stop))
    return tuple(found)


def take(tensor: Tensor, slots: tuple[slice, ...], dim: int) -> Tensor:
    """The slots of `tensor` along `dim`, runs side by side; a view where there is one run."""
    parts = [tensor.narrow(dim, run.start, run.stop - run.start) for run in slots]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
