"""Describes the key/value segments of a softmax attention: their slots, positions, live slots, and their join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.sizes import surely


@dataclass(frozen=True)
class Segment:
    """Keys and values as they are stored, and what each query row sees of them.

    k [Bs, Ts, Hkv, K], v [Bs, Ts, Hkv, V]; rows None (query row b reads row b), [B] or page lists [B, 1 or Hkv, P];
    first: the slots before it; base: the logical position of its slot 0, a number or [B, 1, 1]; lengths [B] or None;
    places: the positions [Bs, Ts] of stored slots, or None where they count on from base.
    """

    k: Tensor
    v: Tensor
    rows: Tensor | None
    first: Any
    base: Any
    lengths: Tensor | None
    places: Tensor | None

    @property
    def paged(self) -> bool:
        """True where rows are page lists."""
        return self.rows is not None and self.rows.dim() == 3

    @property
    def shared_by_all(self) -> bool:
        """True where the segment is stored once, so that all query rows read it; a symbolic size counts as more."""
        return self.rows is not None and self.rows.dim() == 1 and surely(self.k.shape[0] == 1)

    @property
    def count(self) -> Any:
        """Slots it gives a query row."""
        pages = self.rows.shape[2] if self.rows is not None and self.rows.dim() == 3 else 1
        return self.k.shape[1] * pages

    def position(self) -> Tensor:
        """Logical position [1 or B, 1 or Hkv, N] of each slot."""
        if self.places is None:
            return self.base + torch.arange(self.count, device=self.k.device)[None, None, :]
        if self.rows is None:
            return self.places[:, None, :]
        if self.rows.dim() == 1:
            return self.places.index_select(0, self.rows)[:, None, :]
        found = self.places.index_select(0, self.rows.clamp_min(0).flatten())
        return found.view(*self.rows.shape, self.k.shape[1]).flatten(2)

    def live(self) -> Tensor | None:
        """Which slots hold a key, bool [B, 1 or Hkv, N]; None where all do."""
        live = None
        if self.lengths is not None:
            slots = torch.arange(self.count, device=self.k.device)
            live = slots[None, None, :] < self.lengths[:, None, None]
        if self.rows is not None and self.rows.dim() == 3:
            there = (self.rows >= 0).repeat_interleave(self.k.shape[1], 2)
            live = there if live is None else live & there
        return live

    def gathered(self) -> tuple[Tensor, Tensor]:
        """(k [B, N, Hkv, K], v [B, N, Hkv, V]): copied out for every query row."""
        if self.rows is None:
            return self.k, self.v
        if self.rows.dim() == 1:
            return self.k.index_select(0, self.rows), self.v.index_select(0, self.rows)
        return _pages(self.k, self.rows), _pages(self.v, self.rows)

    def all_live(self) -> Segment:
        """The segment without lengths."""
        return replace(self, lengths=None)

    def rest(self, count: int) -> Segment:
        """Its slots from `count` on; not for page lists."""
        places = None if self.places is None else self.places[:, count:]
        lengths = None if self.lengths is None else (self.lengths - count).clamp_min(0)
        k, v, first, base = self.k[:, count:], self.v[:, count:], self.first + count, self.base + count
        return Segment(k, v, self.rows, first, base, lengths, places)

    def cut(self, count: int) -> Segment:
        """Its first `count` slots; of page lists, the pages that hold them."""
        if self.rows is not None and self.rows.dim() == 3:
            return replace(self, rows=self.rows[:, :, : -(-count // max(self.k.shape[1], 1))])
        places = None if self.places is None else self.places[:, :count]
        return replace(self, k=self.k[:, :count], v=self.v[:, :count], places=places)


def _pages(pool: Tensor, rows: Tensor) -> Tensor:
    batch, groups, pages = rows.shape
    rows = rows.clamp_min(0)
    if groups == 1:
        return pool.index_select(0, rows.flatten()).unflatten(0, (batch, pages)).flatten(1, 2)
    heads = torch.arange(groups, device=rows.device)[None, :, None]
    return pool.permute(2, 0, 1, 3)[heads, rows].flatten(2, 3).transpose(1, 2)


@dataclass(frozen=True)
class Keys:
    """k [B, N, Hkv, K], v [B, N, Hkv, V]; position [1 or B, 1 or Hkv, N] of each slot; live [B, 1 or Hkv, N] bool, or
    None where every slot is live.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    live: Tensor | None


def check(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
) -> None:
    """Raise ValueError naming the first argument of softmax_attention whose count, rank or head sizes do not fit."""
    if q.dim() != 4:
        raise ValueError(f"softmax_attention got q with {q.dim()} dimensions; it must be [B, Tq, H, K].")
    if not k or len(k) != len(v):
        raise ValueError(
            f"softmax_attention got {len(k)} key and {len(v)} value segments; give the same number, at least one."
        )
    for name, group in (("rows", rows), ("lengths", lengths), ("positions", positions)):
        if len(group) not in (0, len(k)):
            raise ValueError(
                f"softmax_attention got {len(group)} {name} for {len(k)} segments; give none or one per segment."
            )
    for index, (key, value) in enumerate(zip(k, v, strict=True)):
        if key.dim() != 4 or value.dim() != 4 or key.shape[2] != value.shape[2] or key.shape[3] != q.shape[3]:
            raise ValueError(
                f"softmax_attention got segment {index} with k {list(key.shape)} and v {list(value.shape)} "
                f"for q {list(q.shape)}; "
                "they must be [Bs, Ts, Hkv, K] and [Bs, Ts, Hkv, V] with q's K."
            )
    if q.shape[2] % k[0].shape[2]:
        raise ValueError(
            f"softmax_attention got {q.shape[2]} query heads over {k[0].shape[2]} key heads; the first must be a multiple."
        )
    for index, row in enumerate(rows):
        if row.dim() not in (1, 3) or (row.dim() == 3 and row.shape[1] not in (1, k[0].shape[2])):
            raise ValueError(
                f"softmax_attention got rows {list(row.shape)} for segment {index}; "
                "they must be [B], or page lists [B, 1 or Hkv, pages]."
            )
    for index, key in enumerate(k):
        own, sizes = not rows or _own(rows[index]), (q.shape[0], key.shape[0])
        if own and all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]:
            raise ValueError(
                f"softmax_attention got segment {index} of batch {sizes[1]} for batch {sizes[0]} without a row map; give rows."
            )


def segments(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
) -> list[Segment]:
    """The segments one by one. Without positions a segment's slots count on from the live length of those before it."""
    found = []
    base: Any = 0
    first: Any = 0
    for s in range(len(k)):
        row = rows[s] if rows and not _own(rows[s]) else None
        length = lengths[s] if lengths else None
        places = positions[s] if positions else None
        segment = Segment(k[s], v[s], row, first, base, length, places)
        found.append(segment)
        base = base + (segment.count if length is None else length[:, None, None])
        first = first + segment.count
    return found


def _own(row: Tensor) -> bool:
    """True for the empty row map, by which row b reads row b."""
    return row.dim() == 1 and surely(row.shape[0] == 0)


def join(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
) -> Keys:
    """All segments, copied out for every query row and side by side."""
    parts = segments(k, v, rows, lengths, positions)
    pairs = [part.gathered() for part in parts]
    places, lives = [part.position() for part in parts], [part.live() for part in parts]
    if len(parts) == 1:
        return Keys(*pairs[0], places[0], lives[0])
    live = None
    if any(shown is not None for shown in lives):
        live = _side_by_side(
            [torch.ones_like(p, dtype=torch.bool) if x is None else x for p, x in zip(places, lives, strict=True)]
        )
    keys, values = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
    return Keys(keys, values, _side_by_side(places), live)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[1 or B, 1 or Hkv, N_s] joined along N."""
    batch, heads = torch.broadcast_shapes(*(part.shape[:2] for part in parts))
    return torch.cat([part.expand(batch, heads, -1) for part in parts], 2)
