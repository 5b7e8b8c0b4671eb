"""Turns the operator's tensors into the rows and states that the recurrence kernels read, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.codegen import recurrence_run as run

Arguments = dict[str, Any]


def sequences(given: Arguments, chunk: int) -> run.Rows:
    """The rows of a call: those of its batch, or of its packed sequences."""
    batch, length = given["q"].shape[:2]
    if given["cu_seqlens"] is not None:
        return run.packed_rows(given["cu_seqlens"], length, chunk)
    return run.batch_rows(batch, length, chunk, given["q"].device)


def flat(x: Tensor) -> Tensor:
    """[B, T, ..] as rows [B T, ..], contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def split_state(state: Tensor, seen: Tensor | None, value_dim: int) -> dict[str, Tensor]:
    """The kernels' form of a state [N, H, F, V or V + 1]; that of a sequence without tokens is zero."""
    if seen is not None:
        state = torch.where((seen > 0).view(-1, 1, 1, 1), state, torch.zeros_like(state))
    found = {"state_ptr": state[..., :value_dim].float().contiguous()}
    if state.shape[-1] > value_dim:
        found["state_sum_ptr"] = state[..., value_dim].float().contiguous()
    return found


def final_state(made: run.Pass) -> Tensor:
    """The operator's state [N, H, F, V or V + 1] of a pass."""
    if "final_sum_ptr" not in made.values:
        return made.values["final_ptr"]
    return torch.cat([made.values["final_ptr"], made.values["final_sum_ptr"][..., None]], -1)


def empty_windows(k: Tensor, v: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The window buffers of a recurrence without a window."""
    return k.new_zeros(rows, 0, *k.shape[2:]), v.new_zeros(rows, 0, *v.shape[2:])


def counted(given: Arguments) -> Tensor:
    """Valid tokens of each sequence so far, those before this call included."""
    q, valid, cu = given["q"], given["valid"], given["cu_seqlens"]
    if cu is None:
        count = q.new_full((q.shape[0],), q.shape[1], dtype=torch.int64) if valid is None else valid.sum(1)
    elif valid is None:
        count = cu.diff().to(torch.int64)
    else:
        sums = torch.nn.functional.pad(valid[0].cumsum(0), (1, 0))
        count = sums[cu[1:]] - sums[cu[:-1]]
    return count if given["seen"] is None else count + given["seen"]
