"""Hydra heads: every level also reads the tokens drafted before it (Ankner et al. 2402.05109, §3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.passes.speculate.draft_heads import DraftHeads, stacked


class Hydra(DraftHeads):
    """Level i: skip_i x + SiLU(block_i x) of x = (h, the pending token, the tokens drafted behind it).

    The paper's residual block with a linear skip; both lead to `width` numbers, which the words turn into scores.
    """

    name: ClassVar[str] = "hydra"

    def __init__(self, hidden: int, ids: Tensor, width: int, levels: int) -> None:
        super().__init__(hidden, ids, width, levels)
        self.block = stacked(levels, lambda level: hidden * (level + 2), width)
        self.skip = stacked(levels, lambda level: hidden * (level + 2), width)

    @classmethod
    def count(cls, names: Mapping[str, Tensor]) -> int:
        """The levels that stored parameters are of."""
        return sum(name.startswith("skip.") for name in names)

    def begin(self, start: Tensor) -> None:
        """Blocks that add nothing, skips that read h alone."""
        with torch.no_grad():
            for skip in self.skip:
                skip[:, : self.hidden].copy_(start)

    def features(self, level: int, hidden: Tensor, path: Tensor) -> Tensor:
        """The residual block over everything before the guessed token."""
        x = torch.cat([hidden, path.flatten(1)], 1)
        return self.product(x, self.skip[level]) + F.silu(self.product(x, self.block[level]))
