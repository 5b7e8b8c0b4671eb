"""The ids of the largest logits of each row, found without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers whose order is that of positive numbers with the same bits; a processor compares them several times as fast."""


def top_tokens(logits: Tensor, count: int) -> Tensor:
    """Ids int64 [n, count] of the largest logits [n, V], largest first.

    The largest `count` elements lie in the `count` groups with the largest maxima, so that only those are searched: several
    times as fast as a top-k over a vocabulary of 49,152.
    """
    rows, vocabulary = logits.shape
    groups = vocabulary // GROUP
    if groups <= 2 * count or logits.stride(1) != 1 or rows == 0:
        return logits.topk(min(count, vocabulary), -1).indices
    bits = logits.view(BITS[logits.dtype])
    best = bits[:, : groups * GROUP].view(rows, GROUP, groups).amax(1).topk(count, -1).indices
    steps = torch.arange(0, groups * GROUP, groups, device=logits.device)
    places = (best[:, :, None] + steps).flatten(1)
    if vocabulary % GROUP:
        rest = torch.arange(groups * GROUP, vocabulary, device=logits.device)
        places = torch.cat([places, rest.expand(rows, -1)], 1)
    found = bits.gather(1, places).topk(count, -1)
    if int(found.values.min()) <= 0:  # the bits of negative numbers are ordered the other way
        return logits.topk(count, -1).indices
    return places.gather(1, found.indices)
