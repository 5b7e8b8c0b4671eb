"""Computes one partial state (output, log-sum-exp) on CPU: dense keys, whose stored rows may each serve several query rows."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.state import merge

FOLD_ROWS = 64
"""Query rows per KV group up to which the group's heads are folded into rows too."""
WIDEN_ROWS = 32
"""Query rows from which keys and values of different widths are padded to one, as the library kernel wants them."""
TILE_KEYS = 1024
"""Keys of a tile of the form for softcaps."""
TILE_SCORES = 1 << 22
"""Scores of a tile of the form for softcaps."""


def partial(
    q: Tensor, k: Tensor, v: Tensor, spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [C * n, Tq, H, V], lse [C * n, Tq, H]) of q [C * n, Tq, H, K] over k [n, N, Hkv, K], v [n, N, Hkv, V].

    C query rows in a row read one stored row. visible, bias: [1 or C * n, 1 or H, 1 or Tq, N]. causal: top-left causal
    mask of the library; then neither is given. N is at least 1. An empty row gives (0, -inf); sinks are left out.
    """
    rows = q.shape[0] // k.shape[0] * q.shape[1]
    fits = q.shape[3] == v.shape[3] or rows >= WIDEN_ROWS
    if spec.softcap is None and fits:
        return _library(q, k, v, spec, visible, bias, causal)
    if causal:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()[None, None]
    return _tiled(q, k, v, spec, visible, bias)


def _library(
    q: Tensor, k: Tensor, v: Tensor, spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    width = v.shape[3]
    q, k, v = one_dtype(q, k, v)
    q, k, v = one_width(q, k, v)
    stored, kv_heads = k.shape[0], k.shape[2]
    group = q.shape[2] // kv_heads
    heads_too = group > 1 and not causal and q.shape[0] // stored * q.shape[1] * group <= FOLD_ROWS
    rows = fold(q, stored, kv_heads, heads_too)
    additive = None
    empty = None
    if visible is not None or bias is not None:
        plain = added(visible, bias, compute_dtype(q))
        additive = fold_pairs(plain, q, stored, kv_heads, heads_too)
        shown = plain > -torch.inf if visible is None or bias is not None else visible
        empty = ~fold_pairs(shown, q, stored, kv_heads, heads_too).any(-1)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, *(dense(x.transpose(1, 2)) for x in (k, v)), 0.0, causal, attn_mask=additive, scale=spec.scale
    )
    if empty is not None and bool(empty.any()):
        lse = lse.masked_fill(empty, -torch.inf)
        o = o.masked_fill(empty[..., None], 0.0)
    o, lse = (unfold(x, q, heads_too, group) for x in (o, lse.unsqueeze(-1)))
    return o[..., :width], lse.squeeze(-1)


def added(visible: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The bias where visible and -inf elsewhere, as an additive mask."""
    if visible is None:
        assert bias is not None
        return bias.to(dtype)
    base = torch.zeros((), dtype=dtype) if bias is None else bias.to(dtype)
    return torch.where(visible, base, torch.scalar_tensor(-torch.inf, dtype=dtype))


def one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in the widest of their dtypes."""
    if q.dtype == k.dtype == v.dtype:
        return q, k, v
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, or values, padded by zeros to one width, which changes no score and no output column."""
    spare = v.shape[3] - k.shape[3]
    if spare > 0:
        return torch.nn.functional.pad(q, (0, spare)), torch.nn.functional.pad(k, (0, spare)), v
    return (q, k, v) if spare == 0 else (q, k, torch.nn.functional.pad(v, (0, -spare)))


def dense(operand: Tensor) -> Tensor:
    """The operand with the numbers of one head side by side, which the kernel takes for granted and does not check."""
    return operand if operand.stride(-1) == 1 or operand.shape[-1] == 1 else operand.contiguous()


def fold(x: Tensor, stored: int, kv_heads: int, heads_too: bool) -> Tensor:
    """[C * n, Tq, H, D] as [n, H, C * Tq, D], or with the heads of a KV group as [n, Hkv, C * Tq * G, D]."""
    if heads_too:
        grouped = x.unflatten(2, (kv_heads, -1)).unflatten(0, (stored, -1))
        return dense(grouped.permute(0, 3, 1, 2, 4, 5).flatten(2, 4))
    if x.shape[0] == stored:
        return dense(x.transpose(1, 2))
    return dense(x.unflatten(0, (stored, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3))


def unfold(x: Tensor, q: Tensor, heads_too: bool, group: int) -> Tensor:
    """The inverse of `fold` for [n, H or Hkv, rows, D] and the q that was folded."""
    x = x.transpose(1, 2)
    if not heads_too:
        return x.reshape(*q.shape[:3], x.shape[3])
    return x.unflatten(1, (-1, group)).transpose(2, 3).reshape(*q.shape[:3], x.shape[3])


def fold_pairs(x: Tensor, q: Tensor, stored: int, kv_heads: int, heads_too: bool) -> Tensor:
    """[1 or C * n, 1 or H, 1 or Tq, N] laid out over the rows that `fold` makes of q; dimensions of 1 stay where they can."""
    shared = q.shape[0] // stored
    by_head = x.shape[1] > 1
    if (shared == 1 and not heads_too) or (x.shape[0] == x.shape[2] == 1 and not (heads_too and by_head)):
        return x
    sources = 1 if x.shape[0] == 1 else stored
    x = x.expand(sources * shared, -1, q.shape[1], -1).unflatten(0, (sources, shared))
    if not heads_too:
        return x.transpose(1, 2).flatten(2, 3)
    group = q.shape[2] // kv_heads
    x = x.unflatten(2, (kv_heads, group)) if by_head else x.unsqueeze(3).expand(-1, -1, -1, group, -1, -1)
    return x.permute(0, 2, 1, 4, 3, 5).flatten(2, 4)


def _tiled(
    q: Tensor, k: Tensor, v: Tensor, spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q, k, v)
    stored, kv_heads = k.shape[0], k.shape[2]
    rows = fold(q.to(dtype) * spec.scale, stored, kv_heads, True)
    mask = None
    if visible is not None or bias is not None:
        mask = fold_pairs(added(visible, bias, dtype), q, stored, kv_heads, True)
    size = max(16, TILE_SCORES // (stored * kv_heads * TILE_KEYS))
    states = [
        _over_keys(
            rows[:, :, start : start + size],
            k,
            v,
            spec,
            mask if mask is None or mask.shape[2] == 1 else mask[:, :, start : start + size],
        )
        for start in range(0, rows.shape[2], size)
    ]
    o, lse = (torch.cat(side, 2) for side in zip(*states, strict=True)) if len(states) > 1 else states[0]
    group = q.shape[2] // kv_heads
    return unfold(o, q, True, group), unfold(lse.unsqueeze(-1), q, True, group).squeeze(-1)


def _over_keys(rows: Tensor, k: Tensor, v: Tensor, spec: SoftmaxSpec, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """State of rows [n, Hkv, R, K], already scaled, over all keys, a tile of them at a time."""
    state: tuple[Tensor, Tensor] | None = None
    for start in range(0, k.shape[1], TILE_KEYS):
        part = slice(start, start + TILE_KEYS)
        key, value = (x[:, part].to(rows.dtype).permute(0, 2, 1, 3) for x in (k, v))
        score = products(rows, key.transpose(2, 3))
        if spec.softcap is not None:
            score = score.div_(spec.softcap).tanh_().mul_(spec.softcap)
        if mask is not None:
            score = score.add_(mask if mask.shape[3] == 1 else mask[..., part])
        top = score.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        weight = score.sub_(top).exp_()
        total = weight.sum(-1, keepdim=True)
        mixed = products(weight, value).div_(total.masked_fill(total == 0, 1.0))
        found = mixed, (top + total.log()).squeeze(-1)
        state = found if state is None else merge(*state, *found)
    assert state is not None
    return state


def products(left: Tensor, right: Tensor) -> Tensor:
    """left @ right over [n, h, ..]; stored rows one by one, since a product over both axes would copy strided keys."""
    if left.shape[0] == 1:
        return torch.bmm(left[0], right[0])[None]
    return torch.stack([torch.bmm(a, b) for a, b in zip(left, right, strict=True)])
