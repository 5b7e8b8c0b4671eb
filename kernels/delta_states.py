"""The states of the delta rule, chunk by chunk, and their gradients with two products in the loop and the others outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Corrected(torch.autograd.Function):
    """(states before each chunk [L, n, F, V], corrected values [L, n, C, V], last state) of the delta rule:
    value = fresh - recalled S, S <- e^rate S + leaving value, chunk by chunk (DeltaNet, 2406.06484, §3).

    Backward: from the last chunk to the first dvalue += leaving^T D and D <- dS + e^rate D - recalled^T dvalue; all else
    is computed for all chunks at once.
    """

    @staticmethod
    def forward(
        ctx: Any, recalled: Tensor, fresh: Tensor, leaving: Tensor, rate: Tensor | None, start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        before, value, final = corrected(recalled, fresh, leaving, rate, start)
        ctx.save_for_backward(recalled, leaving, rate, before, value)
        return before, value, final

    @staticmethod
    def backward(ctx: Any, dbefore: Tensor, dvalue: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        recalled, leaving, rate, before, value = ctx.saved_tensors
        count = value.shape[1]
        kept = None if rate is None else torch.exp(rate.expand(-1, count, -1))[..., None]
        change, afters, changes = dfinal, [], []
        for chunk in reversed(range(count)):
            afters.append(change)
            changes.append(torch.baddbmm(dvalue[:, chunk], leaving[:, chunk].transpose(1, 2), change))
            passed = change if kept is None else change * kept[:, chunk]
            passed = torch.baddbmm(passed, recalled[:, chunk].transpose(1, 2), changes[-1], alpha=-1)
            change = passed + dbefore[:, chunk]
        after, dfresh = torch.stack(afters[::-1], 1), torch.stack(changes[::-1], 1)
        drecalled = -torch.matmul(dfresh, before.transpose(-1, -2))
        dleaving = torch.matmul(after, value.transpose(-1, -2))
        drate = None
        if rate is not None and kept is not None and ctx.needs_input_grad[3]:
            drate = ((before * after).sum(-1) * kept[..., 0]).sum_to_size(rate.shape)
        return drecalled, dfresh, dleaving, drate, change


def corrected(
    recalled: Tensor, fresh: Tensor, leaving: Tensor, rate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States before each chunk, values less what the state recalls of their keys, and the last state; chunk by chunk."""
    before, values = [], []
    rates = None if rate is None else torch.exp(rate.expand(-1, fresh.shape[1], -1))[..., None]
    for chunk in range(fresh.shape[1]):
        before.append(state)
        values.append(torch.baddbmm(fresh[:, chunk], recalled[:, chunk], state, alpha=-1))
        kept = state if rates is None else state * rates[:, chunk]
        state = torch.baddbmm(kept, leaving[:, chunk], values[-1])
    return torch.stack(before, 1), torch.stack(values, 1), state
