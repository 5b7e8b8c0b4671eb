"""Answer a model's calls on growing prefixes from one decoder state, which keeps whatever the next prefix shares."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.lookahead import Lookahead
from subquad.runtime.state import DecoderState

ROWS = 16
"""Most columns of a pass that also runs a draft."""
CHUNK = 512
"""Columns that are run at once; a longer prompt is prefilled in parts, which bounds the memory of its activations."""


class PrefixCall:
    """One decoder state and the tokens it holds.

    Because the decoder is causal, keys and values of a column depend on the tokens up to it alone.  So what a call on
    other tokens shares with the state from the left stays, the rest is rolled back, and only new columns are run: a prefix
    that grows by a token costs one column, one that is cropped or edited costs what it must.
    """

    def __init__(self, engine: DecodeEngine, ahead: Lookahead | None = None) -> None:
        """ahead: where drafts come from; without it one column is run per token."""
        self.engine, self.ahead = engine, ahead
        self.state: DecoderState | None = None
        self.ids = self.mask = torch.empty(0, 0, dtype=torch.int64)
        self.others: tuple[Tensor, ...] = ()
        self.columns = 0
        """Columns run in all, for whoever wants to know what was saved."""

    def row(self, ids: Tensor, mask: Tensor | None, index: int, others: tuple[Tensor, ...] = ()) -> Tensor:
        """The logits [B, V] behind column `index` of ids [B, T] (mask [B, T] or None: all ones), in memory of their own.

        others: the inputs of the layout's `Fixed`; where they are not those before, everything is run again.
        Raises GenerationError when the position table has no room.
        """
        total, last = index + 1, index + 1 == ids.shape[1]
        ids, mask = ids[:, :total], torch.ones_like(ids[:, :total]) if mask is None else mask[:, :total]
        state = self.state
        if state is None or state.batch != ids.shape[0] or not self._same(others):
            state = self.state = self.engine.start(ids.shape[0], total + CHUNK, self._fixed(others))
            self.ids = self.mask = ids[:, :0]
        shared = min(_shared(self.ids, ids), _shared(self.mask, mask))
        ahead = self.ahead if last and ids.shape[0] == 1 and bool((mask != 0).all()) else None
        if ahead is not None and shared == total and (known := ahead.row(total)) is not None:
            return known
        kept = min(shared, index)
        if state.length > kept:
            self.engine.rollback(state, state.length - kept)
        masked = len(self.engine.layout.inputs) > 1
        if ahead is not None and total - kept <= ROWS and kept > 0:
            return self._with_drafts(ahead, ids, kept, masked)
        logits = torch.empty(0)
        for start in range(kept, total, CHUNK):
            stop = min(start + CHUNK, total)
            self.ids, self.mask = ids[:, :start], mask[:, :start]
            logits = self.engine.run(state, ids[:, start:stop], mask[:, start:stop] if masked else None)
            self.columns += stop - start
        self.ids, self.mask = ids.clone(), mask.clone()
        return logits[:, -1].clone()

    def _same(self, others: tuple[Tensor, ...]) -> bool:
        return all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(self.others, others, strict=len(self.others) > 0)
        )

    def _fixed(self, others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The values that passes read of these inputs."""
        if self.engine.layout.fixed is None:
            return ()
        self.others = tuple(t.clone() for t in others)
        return self.engine.layout.fixed.values(self.others)

    def _with_drafts(self, ahead: Lookahead, ids: Tensor, kept: int, masked: bool) -> Tensor:
        """The row behind ids [1, T], computed in one pass with the rows of a draft behind them."""
        assert self.state is not None
        limit, total = self.engine.layout.limit, ids.shape[1]
        room = ROWS - (total - kept) if limit is None else min(ROWS - (total - kept), limit - total)
        drafted = ahead.draft(ids[0].tolist(), max(0, room))
        fed = torch.cat([ids, torch.tensor([drafted], dtype=ids.dtype, device=ids.device)], 1) if drafted else ids
        ones = torch.ones_like(fed)
        logits = self.engine.run(self.state, fed[:, kept:], ones[:, kept:] if masked else None, last_only=not drafted)
        self.columns += fed.shape[1] - kept
        self.ids, self.mask = fed.clone(), ones
        rows = logits[0, -1 - len(drafted) :]
        ahead.verified(rows)
        return rows[:1].clone()


def _shared(held: Tensor, wanted: Tensor) -> int:
    """How many columns two tensors [B, *] have in common from the left."""
    count = min(held.shape[1], wanted.shape[1])
    differ = (held[:, :count] != wanted[:, :count]).any(0)
    return int(differ.to(torch.uint8).argmax()) if bool(differ.any()) else count
