"""States softmax attention row by row in fp64: the judge of every faster form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.expression import evaluate
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

    Returns o [B, Tq, H, V] in fp64 and lse [B, Tq, H] in fp64 (always, whatever spec.lse says; the sink is included).
    """
    what = SoftmaxSpec.parse(spec)
    batch, q_len, heads, _ = q.shape
    group = heads // k[0].shape[2]
    outputs, lses = [], []
    for row in range(batch):
        keys, values, places, columns = [], [], [], []
        logical = slot = 0
        for s in range(len(k)):
            source = int(rows[s][row]) if rows else row
            live = int(lengths[s][row]) if lengths else k[s].shape[1]
            keys.append(k[s][source, :live])
            values.append(v[s][source, :live])
            places.append(positions[s][source, :live] if positions else logical + torch.arange(live))
            columns.append(slot + torch.arange(live))
            logical, slot = logical + live, slot + k[s].shape[1]
        key = torch.cat(keys).double().repeat_interleave(group, 1)
        value = torch.cat(values).double().repeat_interleave(group, 1)
        score = torch.einsum("qhk,nhk->hqn", q[row].double(), key) * what.scale
        if what.softcap is not None:
            score = what.softcap * torch.tanh(score / what.softcap)
        if bias is not None:
            full = bias.double().expand(batch, heads, q_len, slot)
            score = score + full[row][:, :, torch.cat(columns)]
        if what.mask is not None:
            env = {
                "b": torch.tensor(row),
                "h": torch.arange(heads)[:, None, None],
                "q": (torch.arange(q_len) if q_positions is None else q_positions[row])[:, None],
                "kv": torch.cat(places)[None, :],
            }
            env |= {f"t{i}": table for i, table in enumerate(operands)} | {
                f"s{i}": torch.tensor(n) for i, n in enumerate(scalars)
            }
            visible = torch.as_tensor(evaluate(what.mask, env)).expand_as(score)
            score = score.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            score = torch.cat([score, sinks.double()[:, None, None].expand(heads, q_len, 1)], -1)
            value = torch.cat(
                [value, torch.zeros_like(value[:1])] if len(value) else [value.new_zeros(1, heads, v[0].shape[-1])]
            )
        lse = torch.logsumexp(score, -1) if score.shape[-1] else score.new_full(score.shape[:-1], -torch.inf)
        empty = lse == -torch.inf
        weight = torch.exp(score - torch.where(empty, 0.0, lse)[..., None])
        out = torch.einsum("hqn,nhv->qhv", weight, value)
        if what.empty_rows != "zero":
            instead = (
                value.sum(0) / max(len(value), 1) if what.empty_rows == "mean" else torch.full_like(out[0], torch.nan)
            )
            out = torch.where(empty.T[..., None], instead, out)
        outputs.append(out)
        lses.append(lse.T)
    return torch.stack(outputs), torch.stack(lses)
