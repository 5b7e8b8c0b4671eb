"""States softmax attention row by row in fp64: the judge of every faster form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.evaluation import evaluate
from subquad.kernels.segments import segments
from subquad.kernels.spec import SoftmaxSpec


def softmax_attention_reference(
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
    """Arguments and meaning of the operator subquad::softmax_attention; everything in fp64, one batch row at a time.

    Returns o [B, Tq, H, V] and lse [B, Tq, H], both in fp64.
    """
    what = SoftmaxSpec.parse(spec)
    batch, q_len, heads, _ = q.shape
    group = heads // k[0].shape[2]
    out = torch.empty(batch, q_len, heads, v[0].shape[3], dtype=torch.float64)
    lses = torch.empty(batch, q_len, heads, dtype=torch.float64)
    slots = sum(part.count for part in segments(k, v, rows, lengths, positions))
    full_bias = None if bias is None else bias.double().expand(batch, heads, q_len, slots)
    for row in range(batch):
        for kv_head in range(k[0].shape[2]):
            own = slice(kv_head * group, (kv_head + 1) * group)
            key, value, place, column = _live_slots(row, kv_head, k, v, rows, lengths, positions)
            score = torch.einsum("qhk,nk->hqn", q[row, :, own].double(), key) * what.scale
            if what.softcap is not None:
                score = what.softcap * torch.tanh(score / what.softcap)
            if full_bias is not None:
                score = score + full_bias[row, own][:, :, column]
            if what.mask is not None:
                env = {
                    "b": torch.tensor(row),
                    "h": torch.arange(heads)[own, None, None],
                    "q": (torch.arange(q_len) if q_positions is None else q_positions[row])[:, None],
                    "i": torch.arange(q_len)[:, None],
                    "kv": place[None, :],
                    "j": column[None, :],
                }
                env |= {f"t{i}": table for i, table in enumerate(operands)}
                env |= {f"s{i}": torch.tensor(n) for i, n in enumerate(scalars)}
                visible = torch.as_tensor(evaluate(what.mask, env)).expand_as(score)
                score = score.masked_fill(~visible, -torch.inf)
            if sinks is not None:
                score = torch.cat([score, sinks[own].double()[:, None, None].expand(group, q_len, 1)], -1)
                value = torch.cat([value, value.new_zeros(1, value.shape[1])])
            lse = torch.logsumexp(score, -1) if score.shape[-1] else score.new_full(score.shape[:-1], -torch.inf)
            empty = lse == -torch.inf
            weight = torch.exp(score - torch.where(empty, 0.0, lse)[..., None])
            mixed = torch.einsum("hqn,nv->qhv", weight, value)
            if what.empty_rows != "zero":
                mean = value.sum(0) / max(len(value), 1)
                mixed = torch.where(empty.T[..., None], mean if what.empty_rows == "mean" else torch.nan, mixed)
            out[row, :, own], lses[row, :, own] = mixed, lse.T
    return out, lses


def _live_slots(
    row: int, kv_head: int, k: Sequence[Tensor], v: Sequence[Tensor], rows: Sequence[Tensor], lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """(k [n, K], v [n, V], logical positions [n], slots in the joined segments [n]) that one batch row and KV head has."""
    found: list[tuple[Tensor, Tensor, int, int]] = []
    logical = first = 0
    for s, part in enumerate(segments(k, v, rows, lengths, positions)):
        size, count = k[s].shape[1], part.count
        live = int(lengths[s][row]) if lengths else count
        for slot in range(live):
            source, place = row, slot
            if part.rows is not None and part.rows.dim() == 3:
                source, place = int(part.rows[row, kv_head if part.rows.shape[1] > 1 else 0, slot // size]), slot % size
            elif part.rows is not None:
                source = int(part.rows[row])
            if source >= 0:
                position = int(positions[s][source, place]) if positions else logical + slot
                found.append((k[s][source, place, kv_head], v[s][source, place, kv_head], position, first + slot))
        logical, first = logical + live, first + count
    if not found:
        return (
            k[0].new_zeros(0, k[0].shape[3]).double(),
            v[0].new_zeros(0, v[0].shape[3]).double(),
            *[torch.arange(0)] * 2,
        )
    keys, values, places, slots = zip(*found, strict=True)
    return torch.stack(keys).double(), torch.stack(values).double(), torch.tensor(places), torch.tensor(slots)
