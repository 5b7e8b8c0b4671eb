"""Turns draft trees given by parent indices into the tables that a tree mask reads."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 64
"""Nodes per word of a bit mask."""


def ancestors(parents: Tensor) -> Tensor:
    """Bool [.., W, W]: entry (i, j) is True when node j is node i or one of its ancestors.

    parents: int64 [.., W]; parents[i] < i, and a negative parent hangs the node on the context, so that a batch may mix
    trees, chains and forests, and pad with single nodes. Raises ValueError where a parent does not come before its node.
    Every round doubles the distance that is known: log2(W) products.
    """
    width = parents.shape[-1]
    order = torch.arange(width, device=parents.device)
    if bool((parents >= order).any()):
        raise ValueError(
            "a draft tree got a node whose parent does not come before it; order nodes from the roots down."
        )
    reach = ((parents[..., None] == order) | torch.eye(width, dtype=torch.bool, device=parents.device)).float()
    for _ in range(max(width - 1, 1).bit_length()):
        reach = (reach @ reach).clamp_max(1.0)
    return reach.bool()


def ancestor_bits(parents: Tensor) -> Tensor:
    """int64 [.., W, ceil(W / 64)]: `ancestors` packed into bits, for masks that read bit(t0[b, i, n // 64], n % 64)."""
    table = ancestors(parents)
    words = -(-table.shape[-1] // WORD)
    padded = torch.nn.functional.pad(table, (0, words * WORD - table.shape[-1])).unflatten(-1, (words, WORD))
    weights = torch.ones(WORD, dtype=torch.int64, device=parents.device) << torch.arange(WORD, device=parents.device)
    return (padded * weights).sum(-1)


def tree_mask(table: str, first: str, words: bool = False) -> str:
    """Mask text: keys before slot `first` are visible, those after it where `table` (t0, ...) says so.

    first: an expression, e.g. "s0" or "t1[b]" for rows with contexts of different length. words: the table comes from
    `ancestor_bits`, not from `ancestors`.
    """
    node = f"(j - {first})"
    seen = f"bit({table}[b, i, {node} // {WORD}], {node} % {WORD})" if words else f"{table}[b, i, {node}]"
    return f"(j < {first}) | {seen}"
