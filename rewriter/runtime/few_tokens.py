"""What the graphs of a few tokens compute once for all layers, and the recurrence of one token, in traceable forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.recurrence_forms import recurrence_torch
from subquad.kernels.visibility import predicate_env, visibility

FORMS = ("visible_keys", "visible_pairs", "visible_slots", "recur")


def visible_keys(columns: Tensor, keys: Tensor, tables: Sequence[Tensor], scalars: Sequence[int], mask: str) -> Tensor:
    """Bool [1, 1, S]: which of `keys` [1, S] the query at `columns` [1] sees.

    One row that holds no draft has its keys in slot order from column 0 on, so that the predicate's kv is a counter and
    its tables are read in order.
    """
    counter = torch.arange(keys.shape[1], device=keys.device)
    return _evaluated(columns[None, :], counter[None, :], tables, scalars, mask).contiguous()


def visible_pairs(
    queries: Tensor, keys: Tensor, tree: Tensor, tables: Sequence[Tensor], scalars: Sequence[int], mask: str
) -> Tensor:
    """Bool [B, w, S]: which of the slots that hold the columns `keys` [B, S] the queries at the columns [B, w] see.

    tree: bool [B, w, S], what comes before a query at all.
    """
    return (_evaluated(queries, keys, tables, scalars, mask) & tree).contiguous()


def visible_slots(
    queries: Tensor, slots: Tensor, tables: Sequence[Tensor], scalars: Sequence[int], mask: str
) -> Tensor:
    """Bool [B, w, N]: which of the shared slots that hold the columns `slots` [N] the queries at the columns [B, w] see."""
    return _evaluated(queries, slots[None], tables, scalars, mask).contiguous()


def _evaluated(queries: Tensor, keys: Tensor, tables: Sequence[Tensor], scalars: Sequence[int], mask: str) -> Tensor:
    env = predicate_env(mask, queries.shape[0], 1, queries, keys[:, None, :], tables, scalars)
    seen = visibility(mask, env, None)
    assert seen is not None
    return seen[:, 0].expand(queries.shape[0], queries.shape[1], keys.shape[1])


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
