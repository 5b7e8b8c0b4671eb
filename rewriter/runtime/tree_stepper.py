"""Verify trees over a decode engine: one state for all rows, each with a length of its own, and what rows share stored once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from subquad.ir.draft import DraftTree
from subquad.runtime.decode_engine import TAIL, DecodeEngine
from subquad.runtime.key_tree import columns_of, separate
from subquad.runtime.own_model import RowModel
from subquad.runtime.prefix_tree import Sharing, sorted_rows
from subquad.runtime.probe_rows import probe_rows
from subquad.runtime.radix_tree import Keys
from subquad.runtime.shared_prompt import KnownPrefixes, run_shared
from subquad.runtime.sharing_plan import SharingPlan, plan_sharing
from subquad.runtime.state import DecoderState
from subquad.runtime.width_class import FEW

Row = TypeVar("Row")


class PromptCache(KnownPrefixes, Protocol):
    """Known prefixes that also takes new ones."""

    def keep(self, tokens: Tensor, take: Callable[[int, int], Keys]) -> None:
        """Hold tokens int64 [T]; take: (first column, behind the last) → their keys."""


class TreeStepper:
    """The Stepper of a derived decoder; an ended row rides along and keeps nothing.

    Rows that share prefixes are neighbours in the state; `order` holds the batch's row at each of its places, None for the
    batch's own order.
    """

    def __init__(
        self, engine: DecodeEngine, capacity: int, share: bool = True,
        on_sharing: Callable[[SharingPlan], None] = lambda plan: None, cache: PromptCache | None = None,
    ) -> None:  # fmt: skip
        """capacity: columns to make room for from the start.  share: compute and store once what rows have in common, where
        that pays.  on_sharing: told what was found.  cache: what earlier calls computed.
        """
        self.engine, self.capacity, self.share, self.on_sharing = engine, capacity, share, on_sharing
        self.cache = cache
        self.state: DecoderState | None = None
        self.order: list[int] | None = None
        self.watched: set[int] = set()
        self._stream: Tensor | None = None
        self._streams: dict[int, Tensor] = {}
        self._prompt: tuple[Tensor, Tensor | None] | None = None

    @property
    def trees(self) -> bool:
        """Whether the model's state can hold branches: no recurrent site, no history that reads the tokens."""
        return self.engine.layout.trees

    @property
    def probing(self) -> bool:
        """Trees may have probes."""
        return True

    @property
    def limit(self) -> int | None:
        """Rows of the model's position table, None without limit."""
        return self.engine.layout.limit

    def prefill(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, V] behind the last token of ids [B, T], padded on the left."""
        room = max(self.capacity, ids.shape[1])
        plan, sharing = self._plan(ids, attention_mask)
        if sharing is None:
            self.on_sharing(plan)
            self.order, self.state = None, self.engine.start(ids.shape[0], room)
            streams: dict[int, Tensor] = {}
            logits = self.engine.run(self.state, ids, attention_mask, streams=streams)[:, -1]
            self._prompt = streams[TAIL], attention_mask
            return logits
        more = room - ids.shape[1]
        logits, state, ran = run_shared(self.engine, ids, attention_mask, sharing, more, self.cache)
        self.on_sharing(replace(plan, cached=plan.computed - ran, computed=ran))
        self.order, self.state = sharing.order.tolist(), state
        self.keep()
        if not plan.once:
            self.state = separate(self.engine.layout, state, more)
        return logits.index_select(0, sharing.place.to(logits.device))

    def keep(self) -> None:
        """Hand what the rows hold to the cache, if there is one."""
        if self.cache is None or self.state is None or self.order is None:
            return
        ids = next(iter(self.state.tokens.values()))
        for row, length in enumerate(self.state.lengths):
            self.cache.keep(ids[row, :length], functools.partial(columns_of, self.state, row))

    def _plan(self, ids: Tensor, mask: Tensor | None) -> tuple[SharingPlan, Sharing | None]:
        """What rows share, and the tree by which the prompts are run; without one they are run as they stand."""
        rows, tokens = ids.shape[0], ids.numel()
        if not self.engine.shares:
            return SharingPlan(rows, tokens, tokens, None, "the model reads the log-sum-exp of an attention"), None
        few = self.engine.compiled.get("few")
        compiled = 0 if few is None or self.engine.joins(few) else FEW
        plan = SharingPlan(rows, tokens, tokens, None, "sharing was turned off")
        if self.share:
            plan = plan_sharing(ids, mask).decided(self.engine.layout.token_bytes, compiled)
        if plan.sharing is None and self.cache is not None:
            return plan, _apart(ids.cpu(), None if mask is None else mask.cpu())
        return plan, plan.sharing

    def _sorted(self, rows: Sequence[Row]) -> list[Row]:
        """What is given per row of the batch, in the order of the state."""
        return list(rows) if self.order is None else [rows[row] for row in self.order]

    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor]:
        """Logits [nodes, V] of every row's tree, its probes behind it; shorter trees are filled up."""
        assert self.state is not None
        self._prompt = None
        trees = self._sorted(trees)
        lengths = [0 if tree is None else tree.rows for tree in trees]
        width = max(lengths)
        parents, device = None, self.engine.device
        probed = any(tree is not None and tree.probes is not None for tree in trees)
        if any(tree is not None and not tree.is_chain for tree in trees) or (probed and self.trees):
            above = [(-1,) * width if tree is None else tree.parents + (-1,) * (width - len(tree)) for tree in trees]
            parents = torch.tensor(above, device=device)
        nodes = torch.tensor([_tokens(tree, width) for tree in trees], device=device)
        beside = probe_rows(trees, width, self.trees, device) if probed else None
        self._streams = dict.fromkeys(self.watched, nodes)
        logits, self._stream = self.engine.verify(self.state, nodes, parents, (), self._streams, beside)
        found = [row[:length] for row, length in zip(logits, lengths, strict=True)]
        if self.order is None:
            return found
        return [row for _, row in sorted(zip(self.order, found, strict=True), key=lambda pair: pair[0])]

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor:
        """What the head of logits read behind nodes of one row of the last `verify`, [n, d]."""
        assert self._stream is not None
        assert self.engine.readout is not None
        return self.engine.readout.reads(self._stream[self.place(row), list(nodes)].unsqueeze(1))

    def place(self, row: int) -> int:
        """Where a row of the batch lies in the state."""
        return row if self.order is None else self.order.index(row)

    def own(self, row: int) -> RowModel:
        """The model as the drafter of one row sees it."""
        return RowModel(self, row)

    def stream(self, block: int, row: int, nodes: Sequence[int]) -> Tensor:
        """The stream [n, ...] in front of a watched block behind nodes of one row of the last `verify`."""
        return self._streams[block][self.place(row), list(nodes)]

    def read(self, row: int) -> Tensor | None:
        """What the head of logits read in one row's prompt, [T, d], until the first `verify`; None where rows shared."""
        if self._prompt is None or self.engine.readout is None:
            return None
        stream, mask = self._prompt[0][row], self._prompt[1]
        return self.engine.readout.reads((stream if mask is None else stream[mask[row] != 0]).unsqueeze(1))

    @property
    def blocks(self) -> int:
        """Blocks that a draft of the model's own can leave out; none where states are recurrent and a draft would move them."""
        return self.engine.blocks if self.trees else 0

    def skipping(self, row: int, tokens: Sequence[int], skip: Collection[int]) -> Tensor:
        """Logits [n, V] of a chain behind one row without some blocks; what it wrote lies behind the rows' ends."""
        assert self.state is not None
        place = self.place(row)
        ids = torch.zeros(self.state.batch, len(tokens), dtype=torch.int64, device=self.engine.device)
        ids[place] = torch.tensor(tokens, device=self.engine.device)
        return self.engine.verify(self.state, ids, None, skip)[0][place]

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes of each row's path."""
        assert self.state is not None
        self.engine.commit(self.state, self._sorted(paths))

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row."""
        assert self.state is not None
        self.engine.rollback(self.state, self._sorted(counts))


def _tokens(tree: DraftTree | None, width: int) -> tuple[int, ...]:
    """The ids of a tree and its probes, filled up."""
    found = () if tree is None else (*tree.tokens, *(() if tree.probes is None else tree.probes.tokens))
    return found + (0,) * (width - len(found))


def _apart(ids: Tensor, mask: Tensor | None) -> Sharing | None:
    """Rows that share nothing, None where the mask hides columns inside a row."""
    try:
        return sorted_rows(ids, mask).tree(0, 0)
    except ValueError:
        return None
