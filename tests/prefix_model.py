"""A language model that is a table over prefixes, and the Stepper that verifies any tree over it, node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from subquad.ir.draft import DraftTree

Forward = Callable[[tuple[int, ...]], Tensor]


def random_model(seed: int, vocabulary: int = 8, memory: int = 3, sharp: float = 2.0) -> Forward:
    """Logits [V] that depend on the last `memory` tokens, so that texts repeat themselves."""

    def forward(prefix: tuple[int, ...]) -> Tensor:
        made = torch.Generator().manual_seed(hash((seed, *prefix[-memory:])) % 2**31)
        return sharp * torch.randn(vocabulary, generator=made)

    return forward


class PrefixStepper:
    """Recomputes every row from its whole prefix: the reference for every other Stepper."""

    def __init__(self, forward: Forward, trees: bool = True, limit: int | None = None) -> None:
        self.forward, self.trees, self.limit = forward, trees, limit
        self.committed: list[tuple[int, ...]] = []
        self.pending: list[DraftTree | None] = []
        self.passes = self.deepest = 0

    def prefill(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        self.committed = [tuple(row[keep != 0].tolist()) for row, keep in zip(ids, mask, strict=True)]
        return torch.stack([self.forward(row) for row in self.committed])

    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor]:
        self.passes += 1
        self.pending = list(trees)
        found = []
        for before, tree in zip(self.committed, trees, strict=True):
            if tree is None:
                found.append(torch.empty(0, 0))
                continue
            assert self.trees or tree.is_chain
            self.deepest = max(self.deepest, *tree.depths)
            assert self.limit is None or len(before) + len(tree) <= self.limit
            paths = [(*before, tree.tokens[0])]
            for node in range(1, len(tree)):
                paths.append((*paths[tree.parents[node]], tree.tokens[node]))
            found.append(torch.stack([self.forward(path) for path in paths]))
        return found

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        for n, (path, tree) in enumerate(zip(paths, self.pending, strict=True)):
            if tree is None:
                assert not path
                continue
            assert list(path) == sorted(path)
            assert all(tree.parents[below] == above for above, below in pairwise(path))
            self.committed[n] += tuple(tree.tokens[node] for node in path)

    def rollback(self, counts: Sequence[int]) -> None:
        self.committed = [row[: len(row) - count] for row, count in zip(self.committed, counts, strict=True)]
