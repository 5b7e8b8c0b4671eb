"""Answer a model's calls on growing prefixes from one decoder state, which keeps whatever the next prefix shares."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.state import DecoderState

CHUNK = 512
"""Columns that are run at once; a longer prompt is prefilled in parts, which bounds the memory of its activations."""


class PrefixCall:
    """One decoder state and the tokens it holds.

    Because the decoder is causal, keys and values of a column depend on the tokens up to it alone.  So what a call on
    other tokens shares with the state from the left stays, the rest is rolled back, and only new columns are run: a prefix
    that grows by a token costs one column, one that is cropped or edited costs what it must.
    """

    def __init__(self, engine: DecodeEngine) -> None:
        self.engine = engine
        self.state: DecoderState | None = None
        self.ids = self.mask = torch.empty(0, 0, dtype=torch.int64)
        self.columns = 0
        """Columns run in all, for whoever wants to know what was saved."""

    def row(self, ids: Tensor, mask: Tensor | None, index: int) -> Tensor:
        """The logits [B, V] behind column `index` of ids [B, T] (mask [B, T] or None: all ones), in memory of their own.

        Raises GenerationError when the position table has no room.
        """
        total = index + 1
        ids, mask = ids[:, :total], torch.ones_like(ids[:, :total]) if mask is None else mask[:, :total]
        state = self.state
        if state is None or state.batch != ids.shape[0]:
            state = self.state = self.engine.start(ids.shape[0], total + CHUNK)
            self.ids = self.mask = ids[:, :0]
        kept = min(_shared(self.ids, ids), _shared(self.mask, mask), index)
        if state.length > kept:
            self.engine.rollback(state, state.length - kept)
        masked = len(self.engine.layout.inputs) > 1
        logits = torch.empty(0)
        for start in range(kept, total, CHUNK):
            stop = min(start + CHUNK, total)
            self.ids, self.mask = ids[:, :start], mask[:, :start]
            logits = self.engine.run(state, ids[:, start:stop], mask[:, start:stop] if masked else None)
            self.columns += stop - start
        self.ids, self.mask = ids.clone(), mask.clone()
        return logits[:, -1].clone()


def _shared(held: Tensor, wanted: Tensor) -> int:
    """How many columns two tensors [B, *] have in common from the left."""
    count = min(held.shape[1], wanted.shape[1])
    differ = (held[:, :count] != wanted[:, :count]).any(0)
    return int(differ.to(torch.uint8).argmax()) if bool(differ.any()) else count
