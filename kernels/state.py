"""Merges partial softmax attention states (output, log-sum-exp) over disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """State of the union of two disjoint key sets: o [..., V], lse [...] natural log, -inf for an empty set.

    Associative and commutative with neutral element (0, -inf); the merge of two empty states is that element, never
    NaN. The output keeps o1's dtype, the weights are computed in lse's dtype. Source: online softmax (Milakov and
    Gimelshein 2018); Hydragen (2402.05099).
    """
    top = torch.maximum(l1, l2)
    base = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    w1, w2 = torch.exp(l1 - base), torch.exp(l2 - base)
    total = w1 + w2
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    mixed = (w1 / safe).unsqueeze(-1) * o1.to(safe.dtype) + (w2 / safe).unsqueeze(-1) * o2.to(safe.dtype)
    lse = torch.where(empty, torch.full_like(total, -torch.inf), base + torch.log(safe))
    return torch.where(empty.unsqueeze(-1), torch.zeros_like(mixed), mixed).to(o1.dtype), lse


def merge_all(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge any positive number of states, kept in lse's precision until the last. Raises ValueError if there is none
    or counts differ.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_all got {len(outputs)} outputs and {len(lses)} lse tensors; give one lse for each of at least one output."
        )
    o, lse = outputs[0].to(lses[0].dtype), lses[0]
    for other, other_lse in zip(outputs[1:], lses[1:], strict=True):
        o, lse = merge(o, lse, other, other_lse)
    return o.to(outputs[0].dtype), lse
