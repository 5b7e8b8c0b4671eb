"""Gradients of one partial softmax state on CPU, its weights recomputed from the log-sum-exp of the whole row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subquad.kernels.softmax_partial import added, dense, fold, fold_pairs, one_dtype, one_width, products, unfold
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import SoftmaxSpec

TILE_KEYS = 512
"""Keys of a tile of the form for softcaps and gradients of a bias."""
TILE_SCORES = 1 << 21
"""Scores of a tile of that form."""

Spread = Callable[[Tensor, slice, slice], None]
"""spread(d loss / d biased scores [C * n, H, rows, slots], rows, slots): adds them to the gradient of the bias."""


def partial_backward(
    q: Tensor, k: Tensor, v: Tensor, result: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor | None],
    spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None, causal: bool, spread: Spread | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of q [C * n, Tq, H, K] over k [n, N, Hkv, K], v [n, N, Hkv, V]: the part that these keys have in them.

    result: (o [C * n, Tq, H, V], lse [C * n, Tq, H]) of the whole rows, so that exp(score - lse) is a key's weight in the
    whole; rows without a key have o 0 and lse inf. grads: theirs, o's 0 on rows without a key. dS = P * (dP - rowsum(o do)
    + dlse), FlashAttention (2205.14135) with lse as a second output. Other arguments as in `partial`.
    """
    if spec.softcap is None and spread is None and q.device.type == "cpu":
        return _library(q, k, v, result, grads, spec, visible, bias, causal)
    return _tiled(q, k, v, result, grads, spec, visible, bias, causal, spread)


def _library(
    q: Tensor, k: Tensor, v: Tensor, result: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor | None],
    spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The library's backward. A gradient of lse rides on one more value column of ones, which enters dP and not o do."""
    (o, lse), (do, dlse) = result, grads
    key_width, value_width = k.shape[3], v.shape[3]
    q, k, v = one_dtype(q, k, v)
    o, do = o.to(q.dtype), do.to(q.dtype)
    if dlse is not None:
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        do = torch.cat([do, dlse.unsqueeze(-1).to(do.dtype)], -1)
    q, k, v = one_width(q, k, v)
    o, do = (torch.nn.functional.pad(x, (0, v.shape[3] - x.shape[3])) for x in (o, do))
    stored, kv_heads = k.shape[0], k.shape[2]
    additive = None
    if visible is not None or bias is not None:
        additive = fold_pairs(added(visible, bias, compute_dtype(q)), q, stored, kv_heads, False)
    rows, grad, out = (fold(x, stored, kv_heads, False) for x in (q, do, o))
    totals = fold(lse.unsqueeze(-1), stored, kv_heads, False).squeeze(-1)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, rows, *(dense(x.transpose(1, 2)) for x in (k, v)), out, totals, 0.0, causal, attn_mask=additive,
        scale=spec.scale,
    )  # fmt: skip
    dq = unfold(dq, q, False, 1)[..., :key_width]
    return dq, dk.transpose(1, 2)[..., :key_width], dv.transpose(1, 2)[..., :value_width]


def _tiled(
    q: Tensor, k: Tensor, v: Tensor, result: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor | None],
    spec: SoftmaxSpec, visible: Tensor | None, bias: Tensor | None, causal: bool, spread: Spread | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (o, lse), (do, dlse) = result, grads
    dtype = compute_dtype(q, k, v)
    shift = -(do.to(dtype) * o.to(dtype)).sum(-1)
    shift = shift if dlse is None else shift + dlse
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    size = max(1, TILE_SCORES // (q.shape[0] * q.shape[2] * TILE_KEYS))
    for start in range(0, q.shape[1], size):
        rows = slice(start, min(start + size, q.shape[1]))
        for first in range(0, k.shape[1], TILE_KEYS):
            slots = slice(first, min(first + TILE_KEYS, k.shape[1]))
            shown, extra = (_tile(x, rows, slots) for x in (visible, bias))
            if causal:
                at, past = (torch.arange(x.start, x.stop, device=q.device) for x in (rows, slots))
                shown = (at[:, None] >= past)[None, None]
            columns = (lse[:, rows], shift[:, rows])
            found = _tile_gradients(
                q[:, rows], k[:, slots], v[:, slots], do[:, rows], columns, spec, shown, extra, spread is not None
            )
            if first == 0:
                dq[:, rows] = found[0]
            else:
                dq[:, rows] += found[0]
            dk[:, slots] += found[1]
            dv[:, slots] += found[2]
            if spread is not None and found[3] is not None:
                spread(found[3], rows, slots)
    return dq, dk, dv


def _tile(pairs: Tensor | None, rows: slice, slots: slice) -> Tensor | None:
    if pairs is None:
        return None
    pairs = pairs if pairs.shape[2] == 1 else pairs[:, :, rows]
    return pairs if pairs.shape[3] == 1 else pairs[..., slots]


def _tile_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, columns: tuple[Tensor, Tensor], spec: SoftmaxSpec,
    visible: Tensor | None, bias: Tensor | None, biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, d biased scores [C * n, H, Tq, N] if asked for) of one tile; columns: lse and dlse - rowsum(o do)."""
    dtype = compute_dtype(q, k, v)
    stored, kv_heads = k.shape[0], k.shape[2]
    group = q.shape[2] // kv_heads
    rows, grad = (fold(x.to(dtype), stored, kv_heads, True) for x in (q, do))
    lse, shift = (fold(x.unsqueeze(-1).to(dtype), stored, kv_heads, True) for x in columns)
    key, value = (x.to(dtype).transpose(1, 2) for x in (k, v))
    score = products(rows, key.transpose(2, 3)) * spec.scale
    slope = None
    if spec.softcap is not None:
        bend = torch.tanh(score / spec.softcap)
        score, slope = bend * spec.softcap, 1 - bend**2
    if visible is not None or bias is not None:
        score = score + fold_pairs(added(visible, bias, dtype), q, stored, kv_heads, True)
    weight = torch.exp(score - lse)
    dscore = weight * (products(grad, value.transpose(2, 3)) + shift)
    spread = None
    if biased:
        by_pair = dscore.unflatten(2, (q.shape[0] // stored, q.shape[1], group))
        spread = by_pair.permute(0, 2, 1, 4, 3, 5).flatten(0, 1).flatten(1, 2)
    if slope is not None:
        dscore = dscore * slope
    dscore = dscore * spec.scale
    dq = unfold(products(dscore, key), q, True, group)
    dk, dv = products(dscore.transpose(2, 3), rows), products(weight.transpose(2, 3), grad)
    return dq, dk.transpose(1, 2), dv.transpose(1, 2), spread
