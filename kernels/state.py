"""Merges partial softmax attention states (output, log-sum-exp) over disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """State of the union of two disjoint key sets: o [..., V], lse [...] natural log, -inf for an empty set.

    Associative and commutative with neutral element (0, -inf); the merge of two empty states is that element, never
    NaN, in values and in gradients. The output keeps o1's dtype, the weights are computed in lse's dtype. Source: online
    softmax (Milakov and Gimelshein 2018); Hydragen (2402.05099).
    """
    empty = (l1 == -torch.inf) & (l2 == -torch.inf)
    one, two = l1.masked_fill(empty, 0.0), l2.masked_fill(empty, 0.0)
    share = torch.sigmoid(two - one).unsqueeze(-1)
    lse = torch.logaddexp(one, two).masked_fill(empty, -torch.inf)
    return torch.lerp(o1.to(share.dtype), o2.to(share.dtype), share).to(o1.dtype), lse


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
