"""Verify trees over a decode engine: one state for all rows, each with a length of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.ir.draft import DraftTree
from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.state import DecoderState


class TreeStepper:
    """The Stepper of a derived decoder; an ended row rides along and keeps nothing."""

    def __init__(self, engine: DecodeEngine, capacity: int) -> None:
        """capacity: columns to make room for from the start."""
        self.engine, self.capacity = engine, capacity
        self.state: DecoderState | None = None

    @property
    def trees(self) -> bool:
        """Whether the model's state can hold branches: no recurrent site, no history that reads the tokens."""
        return self.engine.layout.trees

    @property
    def limit(self) -> int | None:
        """Rows of the model's position table, None without limit."""
        return self.engine.layout.limit

    def prefill(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, V] behind the last token of ids [B, T], padded on the left."""
        self.state = self.engine.start(ids.shape[0], max(self.capacity, ids.shape[1]))
        return self.engine.run(self.state, ids, attention_mask)[:, -1]

    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor]:
        """Logits [nodes, V] of every row's tree; shorter trees are filled up behind their last node."""
        assert self.state is not None
        lengths = [0 if tree is None else len(tree) for tree in trees]
        width = max(lengths)
        filled = [(0,) * width if tree is None else tree.tokens + (0,) * (width - len(tree)) for tree in trees]
        parents = None
        if any(tree is not None and not tree.is_chain for tree in trees):
            above = [(-1,) * width if tree is None else tree.parents + (-1,) * (width - len(tree)) for tree in trees]
            parents = torch.tensor(above, device=self.engine.device)
        logits, _ = self.engine.verify(self.state, torch.tensor(filled, device=self.engine.device), parents)
        return [row[:length] for row, length in zip(logits, lengths, strict=True)]

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes of each row's path."""
        assert self.state is not None
        self.engine.commit(self.state, paths)

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row."""
        assert self.state is not None
        self.engine.rollback(self.state, counts)
