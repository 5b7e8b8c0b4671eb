"""Verify trees over a decode engine: one state for all rows, each with a length of its own, and what rows share stored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from subquad.ir.draft import DraftTree
from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.key_tree import separate
from subquad.runtime.shared_prompt import run_shared
from subquad.runtime.sharing_plan import SharingPlan, plan_sharing
from subquad.runtime.state import DecoderState

Row = TypeVar("Row")


class TreeStepper:
    """The Stepper of a derived decoder; an ended row rides along and keeps nothing.

    Rows that share prefixes are neighbours in the state; `order` holds the batch's row at each of its places, None for the
    batch's own order.
    """

    def __init__(
        self, engine: DecodeEngine, capacity: int, share: bool = True,
        on_sharing: Callable[[SharingPlan], None] = lambda plan: None,
    ) -> None:  # fmt: skip
        """capacity: columns to make room for from the start.  share: compute and store once what rows have in common, where
        that pays.  on_sharing: told what was found.
        """
        self.engine, self.capacity, self.share, self.on_sharing = engine, capacity, share, on_sharing
        self.state: DecoderState | None = None
        self.order: list[int] | None = None

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
        room = max(self.capacity, ids.shape[1])
        plan = self._plan(ids, attention_mask)
        self.on_sharing(plan)
        if plan.sharing is None:
            self.order, self.state = None, self.engine.start(ids.shape[0], room)
            return self.engine.run(self.state, ids, attention_mask)[:, -1]
        more = room - ids.shape[1]
        logits, state = run_shared(self.engine, ids, attention_mask, plan.sharing, more)
        if not plan.once:
            state = separate(self.engine.layout, state, more)
        self.order, self.state = plan.sharing.order.tolist(), state
        return logits.index_select(0, plan.sharing.place.to(logits.device))

    def _plan(self, ids: Tensor, mask: Tensor | None) -> SharingPlan:
        why = None if self.share else "sharing was turned off"
        if not self.engine.shares:
            why = "the model reads the log-sum-exp of an attention"
        if why is not None:
            return SharingPlan(ids.shape[0], ids.numel(), ids.numel(), None, why)
        compiled = next((one.most for one in self.engine.layout.classes if one.name == "step"), 0)
        compiled = compiled if "step" in self.engine.compiled else 0
        return plan_sharing(ids, mask).decided(self.engine.layout.token_bytes, compiled)

    def _sorted(self, rows: Sequence[Row]) -> list[Row]:
        """What is given per row of the batch, in the order of the state."""
        return list(rows) if self.order is None else [rows[row] for row in self.order]

    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor]:
        """Logits [nodes, V] of every row's tree; shorter trees are filled up behind their last node."""
        assert self.state is not None
        trees = self._sorted(trees)
        lengths = [0 if tree is None else len(tree) for tree in trees]
        width = max(lengths)
        filled = [(0,) * width if tree is None else tree.tokens + (0,) * (width - len(tree)) for tree in trees]
        parents = None
        if any(tree is not None and not tree.is_chain for tree in trees):
            above = [(-1,) * width if tree is None else tree.parents + (-1,) * (width - len(tree)) for tree in trees]
            parents = torch.tensor(above, device=self.engine.device)
        logits, _ = self.engine.verify(self.state, torch.tensor(filled, device=self.engine.device), parents)
        found = [row[:length] for row, length in zip(logits, lengths, strict=True)]
        if self.order is None:
            return found
        return [row for _, row in sorted(zip(self.order, found, strict=True), key=lambda pair: pair[0])]

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes of each row's path."""
        assert self.state is not None
        self.engine.commit(self.state, self._sorted(paths))

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row."""
        assert self.state is not None
        self.engine.rollback(self.state, self._sorted(counts))
