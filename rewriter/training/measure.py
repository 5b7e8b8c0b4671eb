"""Perplexity of a converted model on held-out text, and its mean KL to the original."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from subquad.training.losses import ROWS, distributions
from subquad.training.sites import TrainingModel


@torch.no_grad()
def measure(model: TrainingModel, text: Tensor, length: int, rows: int = 2, original: bool = False) -> dict[str, Any]:
    """{"perplexity", "kl", "original_perplexity", "measured_tokens"} over whole rows of `length` tokens of text int64 [n].

    kl: mean over positions of KL(original ‖ model).  original: measure the original attention under the same adapters,
    instead of the rewritten one.  The first token of a row is not predicted.
    """
    blocks = text[: len(text) // length * length].view(-1, length)
    ours = theirs = kl = 0.0
    count = 0
    for start in range(0, len(blocks), rows):
        ids = blocks[start : start + rows]
        states = model.hidden(ids, original)[:, :-1].flatten(0, 1)
        reference = model.reference(ids)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        weight, bias = model.head if model.head is not None else (None, None)
        for first in range(0, len(targets), ROWS):
            part = slice(first, first + ROWS)
            p, q = (distributions(x[part], weight, bias) for x in (reference, states))
            wanted = targets[part, None]
            ours -= float(q.gather(-1, wanted).sum().double())
            theirs -= float(p.gather(-1, wanted).sum().double())
            kl += float((p.exp() * (p - q)).sum().double())
        count += len(targets)
    if not count:
        return {"perplexity": None, "kl": None, "original_perplexity": None, "measured_tokens": 0}
    return {
        "perplexity": math.exp(ours / count),
        "kl": kl / count,
        "original_perplexity": math.exp(theirs / count),
        "measured_tokens": count,
    }
