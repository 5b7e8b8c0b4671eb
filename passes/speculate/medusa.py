"""Medusa heads: every level guesses from the last hidden state alone (Cai et al. 2401.10774, §2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.passes.speculate.draft_heads import DraftHeads, stacked
from subquad.passes.speculate.likeliest_tree import Guess


class Medusa(DraftHeads):
    """Level i: down_i (h + SiLU(block_i h)), the paper's residual block; its own matrix to the vocabulary is words · down_i.

    The levels do not see what was drafted before them, so that one call serves a whole tree: the tree is the most valuable
    part of the cartesian product of their guesses.
    """

    name: ClassVar[str] = "medusa"

    def __init__(self, hidden: int, ids: Tensor, width: int, levels: int) -> None:
        super().__init__(hidden, ids, width, levels)
        self.block = stacked(levels, lambda level: hidden, hidden)
        self.down = stacked(levels, lambda level: hidden, width)

    @classmethod
    def count(cls, names: Mapping[str, Tensor]) -> int:
        """The levels that stored parameters are of."""
        return sum(name.startswith("down.") for name in names)

    def begin(self, start: Tensor) -> None:
        """Blocks that add nothing."""
        with torch.no_grad():
            for down in self.down:
                down.copy_(start)

    def features(self, level: int, hidden: Tensor, path: Tensor) -> Tensor:
        """The residual block, narrowed."""
        return self.product(hidden + F.silu(self.product(hidden, self.block[level])), self.down[level])

    def guesses(self, hidden: Tensor, pending: int) -> Guess:
        """All levels in one product with the words."""
        nothing = hidden[:, None]
        rows = torch.cat([self.features(level, hidden, nothing) for level in range(self.levels)])
        scores = self.product(rows, self.words.weight)
        return lambda level, paths: scores[level].expand(len(paths), -1)
