"""Describes the key/value segments of a softmax attention: slots, positions, liveness, visibility, and their join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.evaluation import evaluate


@dataclass(frozen=True)
class Segment:
    """Keys and values as they are stored, and what each query row sees of them.

    k [Bs, Ts, Hkv, K], v [Bs, Ts, Hkv, V]; rows None (query row b reads row b), [B] or page lists [B, 1 or Hkv, P];
    first: the slots before it; count: the slots N it gives a query row; position [1 or B, 1 or Hkv, N]; live
    [B, 1 or Hkv, N] bool, or None where every slot is live.
    """

    k: Tensor
    v: Tensor
    rows: Tensor | None
    first: Any
    count: Any
    position: Tensor
    live: Tensor | None


@dataclass(frozen=True)
class Keys:
    """k [B, N, Hkv, K], v [B, N, Hkv, V]; position [1 or B, 1 or Hkv, N] of each slot; live [B, 1 or Hkv, N] bool, or
    None where every slot is live.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    live: Tensor | None


def slot_counts(k: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Any]:
    """Slots that each segment gives a query row: its own length, or pages times page size for page lists."""
    if not rows:
        return [key.shape[1] for key in k]
    return [key.shape[1] * (row.shape[2] if row.dim() == 3 else 1) for key, row in zip(k, rows, strict=True)]


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
    if (
        not rows
        and isinstance(q.shape[0], int)
        and any(isinstance(key.shape[0], int) and key.shape[0] != q.shape[0] for key in k)
    ):
        raise ValueError(
            f"softmax_attention got key segments of batch {[key.shape[0] for key in k]} for batch {q.shape[0]}; give rows."
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
    for s, count in enumerate(slot_counts(k, rows)):
        row = rows[s] if rows else None
        slots = torch.arange(count, device=k[s].device)[None, None, :]
        place = base + slots if not positions else _by_row(positions[s], row)
        live = slots < lengths[s][:, None, None] if lengths else None
        if row is not None and row.dim() == 3:
            there = (row >= 0).repeat_interleave(k[s].shape[1], 2)
            live = there if live is None else live & there
        found.append(Segment(k[s], v[s], row, first, count, place, live))
        base = base + (lengths[s][:, None, None] if lengths else count)
        first = first + count
    return found


def _by_row(position: Tensor, rows: Tensor | None) -> Tensor:
    """Positions [Bs, Ts] of stored slots as [B, 1 or Hkv, N] of the slots that each query row reads."""
    if rows is None:
        return position[:, None, :]
    if rows.dim() == 1:
        return position.index_select(0, rows)[:, None, :]
    return position.index_select(0, rows.clamp_min(0).flatten()).view(*rows.shape, position.shape[1]).flatten(2)


def gathered(segment: Segment) -> tuple[Tensor, Tensor]:
    """(k [B, N, Hkv, K], v [B, N, Hkv, V]): the segment copied out for every query row."""
    rows = segment.rows
    if rows is None:
        return segment.k, segment.v
    if rows.dim() == 1:
        return segment.k.index_select(0, rows), segment.v.index_select(0, rows)
    batch, groups, pages = rows.shape
    flat = rows.clamp_min(0).flatten()
    if groups == 1:
        k, v = (x.index_select(0, flat).unflatten(0, (batch, pages)).flatten(1, 2) for x in (segment.k, segment.v))
        return k, v
    heads = torch.arange(groups, device=rows.device)[None, :, None]
    k, v = (
        x.permute(2, 0, 1, 3)[heads, rows.clamp_min(0)].flatten(2, 3).transpose(1, 2) for x in (segment.k, segment.v)
    )
    return k, v


def join(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
) -> Keys:
    """All segments, copied out for every query row and side by side."""
    parts = segments(k, v, rows, lengths, positions)
    pairs = [gathered(part) for part in parts]
    if len(parts) == 1:
        return Keys(*pairs[0], parts[0].position, parts[0].live)
    lives = None
    if any(part.live is not None for part in parts):
        shown = [
            part.live if part.live is not None else torch.ones_like(part.position, dtype=torch.bool) for part in parts
        ]
        lives = _side_by_side(shown)
    keys, values = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
    return Keys(keys, values, _side_by_side([part.position for part in parts]), lives)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[1 or B, 1 or Hkv, N_s] joined along N."""
    batch, heads = torch.broadcast_shapes(*(part.shape[:2] for part in parts))
    return torch.cat([part.expand(batch, heads, -1) for part in parts], 2)


def split(joined: Tensor, like: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """The transpose of `join` for one of k and v: gradients [B, N, Hkv, *] back to segments shaped as `like`."""
    parts = torch.split(joined, [segment.shape[1] for segment in like], 1)
    if not rows:
        return [part.to(segment.dtype).clone() for part, segment in zip(parts, like, strict=True)]
    return [
        torch.zeros(segment.shape, dtype=part.dtype, device=part.device).index_add_(0, row, part).to(segment.dtype)
        for part, segment, row in zip(parts, like, rows, strict=True)
    ]


def predicate_env(
    batch: Any, heads: int, query: Tensor, position: Tensor, operands: Sequence[Tensor], scalars: Sequence[int],
    first: Any = 0,
) -> dict[str, Any]:  # fmt: skip
    """Index tensors that broadcast to [B, H, Tq, N], tables and scalars, as `evaluate` wants them.

    query [1 or B, Tq], position [1 or B, 1 or Hkv, N]; first: the slots before these.
    """
    device = position.device
    env: dict[str, Any] = {
        "b": torch.arange(batch, device=device)[:, None, None, None],
        "h": torch.arange(heads, device=device)[None, :, None, None],
        "q": query[:, None, :, None],
        "kv": per_head(position, heads),
        "i": torch.arange(query.shape[1], device=device)[None, None, :, None],
        "j": (first + torch.arange(position.shape[2], device=device))[None, None, None, :],
    }
    env |= {f"t{index}": table for index, table in enumerate(operands)}
    env |= {f"s{index}": number for index, number in enumerate(scalars)}
    return env


def per_head(slots: Tensor, heads: int) -> Tensor:
    """[1 or B, 1 or Hkv, N] as [1 or B, 1 or H, 1, N]."""
    if slots.shape[1] > 1:
        slots = slots.repeat_interleave(heads // slots.shape[1], 1)
    return slots[:, :, None, :]


def query_positions(q: Tensor, q_positions: Tensor | None) -> Tensor:
    """Logical query indices [1 or B, Tq]."""
    return torch.arange(q.shape[1], device=q.device)[None, :] if q_positions is None else q_positions


def visibility(mask: str | None, env: dict[str, Any], seen: Tensor | None) -> Tensor | None:
    """Bool [1 or B, 1 or H, 1 or Tq, N] of the pairs seen, or None where every pair is; seen: [.., N], which slots live."""
    if mask is None:
        return seen
    holds = evaluate(mask, env)
    if not isinstance(holds, Tensor):
        holds = torch.full_like(env["kv"], bool(holds), dtype=torch.bool)
    while holds.dim() < 4:
        holds = holds[None]
    holds = holds.expand(*holds.shape[:3], env["kv"].shape[-1])
    return holds if seen is None else holds & seen
