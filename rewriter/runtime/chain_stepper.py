"""Steppers over a decode engine: chains with a state for each row, and rows in lockstep for decoding without drafts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.ir.draft import DraftTree
from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.state import DecoderState


class ChainStepper:
    """The Stepper of any decoder that can step and roll back; padding is left out instead of masked.

    Recurrent states go back to a checkpoint and replay the accepted tokens.
    """

    trees = False

    def __init__(self, engine: DecodeEngine, capacity: int) -> None:
        """capacity: columns to make room for from the start."""
        self.engine, self.capacity = engine, capacity
        self.states: list[DecoderState] = []
        self._fed: list[int] = []

    @property
    def limit(self) -> int | None:
        """Rows of the model's position table, None without limit."""
        return self.engine.layout.limit

    def prefill(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, V] behind the last token of ids [B, T], padded on the left."""
        rows = []
        for n in range(ids.shape[0]):
            real = ids[n] if attention_mask is None else ids[n][attention_mask[n] != 0]
            state = self.engine.start(1, max(self.capacity, len(real)))
            rows.append(self.engine.run(state, real[None])[0, -1])
            self.states.append(state)
        return torch.stack(rows)

    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor]:
        """Logits [nodes, V] of each row's chain; [0, 0] for an ended row."""
        found = []
        self._fed = [0 if tree is None else len(tree) for tree in trees]
        for state, tree in zip(self.states, trees, strict=True):
            if tree is None:
                found.append(torch.empty(0, 0))
                continue
            assert tree.is_chain
            ids = torch.tensor([tree.tokens], device=self.engine.device)
            found.append(self.engine.run(state, ids, None, False)[0])
        return found

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Roll each row back to the root and the nodes of its path."""
        for state, fed, path in zip(self.states, self._fed, paths, strict=True):
            if fed > len(path):
                self.engine.rollback(state, fed - len(path))

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row."""
        for state, count in zip(self.states, counts, strict=True):
            self.engine.rollback(state, count)


class LockStepper:
    """The Stepper of a batch that never drafts: all rows share one state and take one token a pass."""

    trees = False

    def __init__(self, engine: DecodeEngine, capacity: int) -> None:
        """capacity: columns to make room for from the start."""
        self.engine, self.capacity = engine, capacity
        self.state: DecoderState | None = None

    @property
    def limit(self) -> int | None:
        """Rows of the model's position table, None without limit."""
        return self.engine.layout.limit

    def prefill(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, V] behind the last token of ids [B, T], padded on the left."""
        self.state = self.engine.start(ids.shape[0], max(self.capacity, ids.shape[1]))
        return self.engine.run(self.state, ids, attention_mask)[:, -1]

    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor]:
        """Logits [1, V] behind each row's pending token; an ended row rides along."""
        assert self.state is not None
        assert all(tree is None or len(tree) == 1 for tree in trees)
        ids = torch.tensor([[0 if tree is None else tree.tokens[0]] for tree in trees], device=self.engine.device)
        return list(self.engine.run(self.state, ids))

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Nothing was drafted, so all stays."""
