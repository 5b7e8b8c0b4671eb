"""Heads that guess the tokens behind the pending one from what the model's head of logits read; the base of all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from subquad.passes.speculate.frequent_words import FrequentWords
from subquad.passes.speculate.head_drafts import HeadDrafter
from subquad.passes.speculate.likeliest_tree import Guess


class DraftHeads(FrequentWords):
    """Heads whose guesses read no more than the last hidden state and the tokens behind it."""

    def drafter(self) -> HeadDrafter:
        """Trees of the likeliest guesses."""
        return HeadDrafter(self)

    @abstractmethod
    def features(self, level: int, hidden: Tensor, path: Tensor) -> Tensor:
        """[n, width] of a level, from hidden [n, d] and embeddings [n, level + 1, d] of the pending token and a path."""

    def scores(self, level: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """[n, R] of a level; hidden: [n, d].  tokens: int64 [n, level + 1], the pending token and a path."""
        return self.product(self.features(level, hidden, self.embedded(tokens)), self.words.weight)

    def guesses(self, hidden: Tensor, pending: int) -> Guess:
        """The scores of one sequence; hidden: [1, d]."""
        first = torch.tensor([[pending]])

        def guess(level: int, paths: Tensor) -> Tensor:
            n = len(paths)
            return self.scores(level, hidden.expand(n, -1), torch.cat([first.expand(n, 1), paths], 1))

        return guess


def stacked(levels: int, inputs: Callable[[int], int], outputs: int) -> nn.ParameterList:
    """One weight [outputs, inputs(i)] for every level, zero to begin with."""
    return nn.ParameterList(torch.zeros(outputs, inputs(level)) for level in range(levels))
