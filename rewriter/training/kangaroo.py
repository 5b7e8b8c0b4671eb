"""Train Kangaroo's adapter: the model's first blocks run once over every sequence, and stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from subquad.decoder import Decoder
from subquad.passes.speculate.kangaroo import Kangaroo
from subquad.runtime.own_model import FirstBlocks
from subquad.training.exits import ExitTraining
from subquad.training.foretold import Foretold

RATE = 1e-3


class KangarooTraining(ExitTraining):
    """What the first blocks make of a sequence is kept for the next epoch."""

    def __init__(self, part: Kangaroo, decoder: Decoder, text: Foretold, seed: int = 0) -> None:
        self.adapter = part
        self.first = FirstBlocks(decoder.engine, part.blocks, {})
        self._known: dict[int, Tensor] = {}
        super().__init__(part, text, RATE, seed)

    def parameters(self) -> dict[str, Tensor]:
        """The adapter's and its norms'."""
        return dict(self.part.named_parameters())

    def streams(self, sequences: Sequence[slice]) -> list[Tensor]:
        """Behind the adapter."""
        rows = pad_sequence([self._shallow(one) for one in sequences], batch_first=True)
        return [self.adapter(rows)]

    def _shallow(self, one: slice) -> Tensor:
        if one.start not in self._known:
            ids = self.text.ids[one].tolist()
            self._known[one.start] = self.first.run(ids, 0, range(self.adapter.blocks)).cpu()
        with torch.inference_mode(False):
            return self._known[one.start].clone().float()
