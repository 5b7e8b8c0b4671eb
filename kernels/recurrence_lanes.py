"""Brings the tokens of a recurrence into lanes and chunks: sizes, padding, gates, and additive weights as decays."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.features import repeat_heads
from subquad.kernels.recurrence_layout import pick
from subquad.kernels.sizes import surely
from subquad.kernels.spec import RecurrenceSpec

CHUNK = 64
"""Tokens per chunk; shorter inputs are one chunk."""
NOTHING = -1e30
"""Logarithm of an empty sum; finite, so that differences of it are."""


def chunking(total: Any, spec: RecurrenceSpec) -> tuple[int, Any]:
    """(chunk, number of chunks): a chunk is 64 tokens, or what holds a shorter input."""
    if not surely(total <= CHUNK):
        count = (total + CHUNK - 1) // CHUNK
        # One chunk of padding: a symbolic count of at least 2 needs no guard for the size 1.
        return CHUNK, count if isinstance(total, int) else count + 1
    halves = spec.update == "delta" or spec.decay in ("channel", "additive")
    if isinstance(total, int):
        return (1 << (total - 1).bit_length() if halves else total), 1
    return (CHUNK if halves else total), 1


def counted(live: Any, span: Any, q: Tensor, whole: bool, valid: Tensor | None) -> Tensor | None:
    """Bool [1 or B, span] of the tokens that count; None when all do."""
    if valid is None and whole:
        return None
    slots = torch.arange(span, device=q.device)[None]
    if isinstance(live, Tensor) and live.dtype == torch.bool:
        return F.pad(live, (0, span - live.shape[1]))
    return slots < live


def ordered(x: Tensor | None, order: Tensor) -> Tensor | None:
    """Tokens of x [B, T, ..] in the given order [B, T]; what has no token axis as it is."""
    if x is None or x.dim() == 1:
        return x
    return pick(x[..., None], order)[..., 0] if x.dim() == 3 else pick(x, order)


def longer(x: Tensor, missing: Any, axis: int = 1) -> Tensor:
    """x with `missing` zeros behind its tokens."""
    if isinstance(missing, int) and missing == 0:
        return x
    return F.pad(x, (*(0, 0) * (x.dim() - 1 - axis), 0, missing))


def in_lanes(x: Tensor, heads: int) -> Tensor:
    """[B, T, H or Hkv, ..] as [B, H, T, ..]."""
    return repeat_heads(x, heads) if x.dim() == 4 else repeat_heads(x[..., None], heads)[..., 0]


def gates_of(decay: Tensor, like: Tensor, shape: tuple[Any, Any], live: Tensor | None) -> Tensor:
    """Log decays [B H, n or 1, C, 1 or F] of features [B, H, T, F]; hidden tokens do not decay."""
    batch, heads = like.shape[:2]
    if decay.dim() == 1:
        decay = decay.repeat_interleave(heads // decay.shape[0]).view(1, heads, 1, 1)
        if live is None:
            return decay.expand(batch, -1, shape[1], -1).flatten(0, 1)[:, None]
        decay = decay.expand(batch, -1, like.shape[2], -1)
    else:
        decay = in_lanes(decay, heads) if decay.dim() == 4 else in_lanes(decay, heads)[..., None]
    if live is not None:
        decay = decay.masked_fill(~live[:, None, :, None], 0)
    return decay.flatten(0, 1).unflatten(1, shape)


def additive(
    logs: Tensor, past: Tensor | None, seen: Tensor | None, live: Tensor | None, shape: tuple[Any, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(shares of the sum [B, H, T, F], log decays [B H, n, C, F], log of the last sum [B, H, F, 1]) of log weights.

    With z the running log-sum-exp, LightNet's S_t = S_t-1 e^{z_t-1 - z_t} + e^{k_t - z_t} v_t (2405.21022): no weight
    and no decay is above 1.
    """
    hidden = None if live is None else ~live[:, None, :, None]
    logs = logs if hidden is None else logs.masked_fill(hidden, NOTHING)
    first = logs.new_full((), NOTHING).expand(*logs.shape[:2], 1, logs.shape[3])
    if past is not None and seen is not None:
        first = torch.where((seen == 0)[:, None, None, None], first, past[..., -1][:, :, None])
    sums = torch.logcumsumexp(torch.cat([first, logs], 2), 2)
    before, after = sums[:, :, :-1], sums[:, :, 1:]
    shares = torch.exp(logs - after)
    shares = shares if hidden is None else shares.masked_fill(hidden, 0)
    decay = (before - after).masked_fill(before <= NOTHING / 2, 0)
    last = sums[:, :, -1, :, None]
    return shares, decay.flatten(0, 1).unflatten(1, shape), last.masked_fill(last <= NOTHING / 2, 0)
