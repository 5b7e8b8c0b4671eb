"""Forms of attention that Inductor turns into memory-speed loops when one row holds one token: sums of products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.recurrence_forms import recurrence_torch
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.visibility import predicate_env, visibility

FORMS = ("visible_keys", "attend", "recur")


def visible_keys(columns: Tensor, keys: Tensor, tables: Sequence[Tensor], scalars: Sequence[int], mask: str) -> Tensor:
    """Bool [1, 1, 1, N]: which of `keys` [1, N] the query at `columns` [1] sees.

    One row that holds no draft has its keys in slot order from column 0 on, so that the predicate's kv is a counter and
    its tables are read in order.
    """
    counter = torch.arange(keys.shape[1], device=keys.device)
    env = predicate_env(mask, 1, 1, columns[None, :], counter[None, None, :], tables, scalars)
    seen = visibility(mask, env, None)
    assert seen is not None
    return seen


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor | None, spec: str) -> Tensor:
    """Softmax attention of q [1, 1, H, K] over k [1, N, Hkv, K], v [1, N, Hkv, V], heads of a KV group folded into rows.

    Sums of products throughout, in fp32 (fp64); returns [1, 1, H, V] in q's dtype.
    """
    what = SoftmaxSpec.parse(spec)
    wide = compute_dtype(q)
    kv_heads = k.shape[2]
    rows = (_made_real(q).to(wide) * what.scale).unflatten(2, (kv_heads, -1))
    score = (rows * k.unsqueeze(3)).sum(-1, dtype=wide)
    if what.softcap is not None:
        score = what.softcap * torch.tanh(score / what.softcap)
    score = score.masked_fill(~visible[:, 0, 0, :, None, None], -torch.inf)
    top = score.amax(1, keepdim=True)
    if sinks is not None:
        extra = sinks.to(wide).view(1, 1, kv_heads, -1)
        top = torch.maximum(top, extra)
    if what.empty_rows != "nan":
        top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weight = torch.exp(score - top)
    total = weight.sum(1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(extra - top)
    elif what.empty_rows == "zero":
        total = torch.where(total == 0, torch.ones_like(total), total)
    mixed = ((weight / total).unsqueeze(-1) * v.unsqueeze(3)).sum(1, dtype=wide)
    if sinks is None and what.empty_rows == "mean":
        mean = v.to(wide).mean(1)[:, :, None]
        mixed = torch.where((total[:, 0] == 0)[..., None], mean, mixed)
    return mixed.flatten(1, 2).unsqueeze(1).to(q.dtype)


def recur(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor], window_gate: Tensor | None, valid: Tensor | None, state: Tensor, window_k: Tensor,
    window_v: Tensor, seen: Tensor, cu_seqlens: Tensor | None, spec: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator subquad::recurrence in its traceable form where it has one."""
    learned, carried = (feature_q, feature_k, window_gate), (state, window_k, window_v, seen)
    arguments = (q, k, v, decay, beta, *learned, valid, *carried, cu_seqlens, spec)
    form = recurrence_torch(*arguments)
    return torch.ops.subquad.recurrence.default(*arguments) if form is NotImplemented else form


def _made_real(x: Tensor) -> Tensor:
    """x itself; Inductor stores it before its readers run, instead of computing it again in each of them."""
    return torch.as_strided(x, x.shape, x.stride())
