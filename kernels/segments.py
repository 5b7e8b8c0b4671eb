"""Joins the key/value segments of a softmax attention into one dense view with positions, liveness and visibility."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.expression import evaluate


@dataclass(frozen=True)
class Keys:
    """k [B, N, Hkv, K], v [B, N, Hkv, V], position [1 or B, N] of each slot, live [B, N] bool or None where every slot
    is live.
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
    if (
        not rows
        and isinstance(q.shape[0], int)
        and any(isinstance(key.shape[0], int) and key.shape[0] != q.shape[0] for key in k)
    ):
        raise ValueError(
            f"softmax_attention got key segments of batch {[key.shape[0] for key in k]} for batch {q.shape[0]}; give rows."
        )


def join(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
) -> Keys:
    """Segments side by side. Without positions a segment's slots count on from the live length of those before it."""
    device = k[0].device
    keys, values, places, lives = [], [], [], []
    base: Any = 0
    for s, (key, value) in enumerate(zip(k, v, strict=True)):
        slots = torch.arange(key.shape[1], device=device)
        keys.append(key.index_select(0, rows[s]) if rows else key)
        values.append(value.index_select(0, rows[s]) if rows else value)
        if positions:
            places.append(positions[s].index_select(0, rows[s]) if rows else positions[s])
        else:
            places.append(base + slots[None, :])
        if lengths:
            lives.append(slots[None, :] < lengths[s][:, None])
            base = base + lengths[s][:, None]
        else:
            base = base + key.shape[1]
    if len(k) == 1:
        return Keys(keys[0], values[0], places[0], lives[0] if lives else None)
    widest = (
        max(place.shape[0] for place in places)
        if all(isinstance(place.shape[0], int) for place in places)
        else keys[0].shape[0]
    )
    places = [place.expand(widest, -1) for place in places]
    return Keys(torch.cat(keys, 1), torch.cat(values, 1), torch.cat(places, 1), torch.cat(lives, 1) if lives else None)


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
    batch: Any, heads: int, query: Tensor, position: Tensor, operands: Sequence[Tensor], scalars: Sequence[int]
) -> dict[str, Any]:
    """Index tensors that broadcast to [B, H, Tq, N], tables and scalars, as `evaluate` wants them."""
    device = position.device
    env: dict[str, Any] = {
        "b": torch.arange(batch, device=device)[:, None, None, None],
        "h": torch.arange(heads, device=device)[None, :, None, None],
        "q": query[:, None, :, None],
        "kv": position[:, None, None, :],
    }
    env |= {f"t{index}": table for index, table in enumerate(operands)}
    env |= {f"s{index}": number for index, number in enumerate(scalars)}
    return env


def query_positions(q: Tensor, q_positions: Tensor | None) -> Tensor:
    """Logical query indices [1 or B, Tq]."""
    return torch.arange(q.shape[1], device=q.device)[None, :] if q_positions is None else q_positions


def visibility(mask: str | None, env: dict[str, Any], live: Tensor | None) -> Tensor | None:
    """Bool [1 or B, 1 or H, 1 or Tq, N] of the pairs seen, or None where every pair is."""
    seen = None if live is None else live[:, None, None, :]
    if mask is None:
        return seen
    holds = evaluate(mask, env)
    if not isinstance(holds, Tensor):
        holds = torch.full_like(env["kv"], bool(holds), dtype=torch.bool)
    while holds.dim() < 4:
        holds = holds[None]
    holds = holds.expand(*holds.shape[:3], env["kv"].shape[-1])
    return holds if seen is None else holds & seen
