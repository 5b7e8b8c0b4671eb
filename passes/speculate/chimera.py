"""Chimera: a trigram encoder, one layer over the whole context, and residual heads (Zeng et al. 2402.15758, §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.passes.speculate.context_heads import REACH, ContextHeads
from subquad.passes.speculate.context_layer import ContextLayer
from subquad.passes.speculate.draft_heads import stacked
from subquad.passes.speculate.likeliest_tree import Guess


class Chimera(ContextHeads):
    """A token that the model has not read is stood for by its trigram, and imitates what the model's head would read there.

    Trigram encoder: g = skip x + SiLU(block x) of x = (three embeddings).  Context layer: its queries are the trigrams of the
    pending token and of the tokens drafted behind it; its keys are what the head read behind all committed tokens, and those
    trigrams up to the query's own.  Level i: skip_i y + SiLU(block_i y) of y = (the last h, the layer's output at the path's
    end).  The paper's layers are as wide as the model; these have `width` numbers.
    """

    name: ClassVar[str] = "chimera"
    narrow: Tensor

    def __init__(self, hidden: int, ids: Tensor, width: int, levels: int) -> None:
        super().__init__(hidden, ids, width, levels)
        self.trigram_skip, self.trigram_block = (nn.Linear(3 * hidden, width, bias=False) for _ in range(2))
        self.enter = nn.Linear(hidden, width, bias=False)
        self.layer = ContextLayer(width)
        self.block = stacked(levels, lambda level: hidden + width, width)
        self.skip = stacked(levels, lambda level: hidden + width, width)
        self.register_buffer("narrow", torch.zeros(width, hidden))

    @classmethod
    def count(cls, names: Mapping[str, Tensor]) -> int:
        """The levels that stored parameters are of."""
        return sum(name.startswith("skip.") for name in names)

    def begin(self, start: Tensor) -> None:
        """Heads that read h and what imitates it alike, as the paper's copies of the model's head do.

        narrow: `start`, by which the context layer is told what to imitate.
        """
        with torch.no_grad():
            self.narrow.copy_(start)
            self.enter.weight.copy_(start)
            for skip in self.skip:
                skip[:, : self.hidden].copy_(start)
                skip[:, self.hidden :].copy_(torch.eye(self.width))

    def trigrams(self, tokens: Tensor) -> Tensor:
        """[..., n, w] of tokens int64 [..., n + 2], of which the first two only stand before."""
        rows = self.embedded(tokens)
        x = torch.cat([rows[..., :-2, :], rows[..., 1:-1, :], rows[..., 2:, :]], -1)
        return self.product(x, self.trigram_skip.weight) + F.silu(self.product(x, self.trigram_block.weight))

    def features(self, level: int, hidden: Tensor, fast: Tensor) -> Tensor:
        """[..., w] of a level; hidden: [..., d].  fast: [..., w], the layer's output."""
        y = torch.cat([hidden, fast], -1)
        return self.product(y, self.skip[level]) + F.silu(self.product(y, self.block[level]))

    def along(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The layer's output [B, T, levels, w] behind every place of texts, for paths that are the text itself.

        hidden: [B, T, d].  ids: int64 [B, T]; at [b, t, i] stands the output at token t + 1 + i, the model having read up to t.
        """
        (batch, width), levels = ids.shape, self.levels
        grams = self.trigrams(torch.cat([ids[:, :1], ids[:, :1], ids], 1))
        places = torch.arange(width)
        read = self.layer.keys(self.product(hidden, self.enter.weight), places, self.product)
        own = self.layer.keys(grams, places, self.product)
        at = (places[:, None] + torch.arange(1, levels + 1)).clamp_max(width - 1).flatten()
        ends, last = places.repeat_interleave(levels)[:, None], at[:, None]
        seen = torch.cat([places <= ends, (places > ends) & (places <= last) | (places == last)], 1)
        keys, values = (torch.cat(pair, 1) for pair in zip(read, own, strict=True))
        out = self.layer(grams[:, at], at, keys, values, seen, self.product)
        return out.view(batch, width, levels, self.width)

    def opened(self) -> _Context:
        """An empty context."""
        return _Context(self)


class _Context:
    """keys, values: [n, H, w / H] of committed tokens; tail: the last two of these; last: what was read behind the last."""

    def __init__(self, heads: Chimera) -> None:
        self.heads = heads
        layer = heads.layer
        empty = heads.words.weight.new_empty(0, layer.heads, heads.width // layer.heads)
        self.keys, self.values = empty, empty
        self.tail: list[int] = []
        self.length = 0
        self.last: Tensor | None = None

    def add(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Committed tokens."""
        if not tokens:
            return
        heads, places = self.heads, torch.arange(self.length, self.length + len(tokens))
        found = heads.layer.keys(heads.product(hidden, heads.enter.weight), places, heads.product)
        self.keys, self.values = (
            torch.cat(pair)[-REACH:] for pair in zip((self.keys, self.values), found, strict=True)
        )
        self.tail = [*self.tail, *tokens][-2:]
        self.length += len(tokens)
        self.last = hidden[-1:]

    def guesses(self, pending: int) -> Guess | None:
        """A level runs the trigrams of all paths together."""
        if self.last is None:
            return None
        heads, last, tail = self.heads, self.last, [self.tail[0]] * (2 - len(self.tail)) + self.tail

        def guess(level: int, paths: Tensor) -> Tensor:
            n = len(paths)
            tokens = torch.cat([torch.tensor([[*tail, pending]]).expand(n, -1), paths], 1)
            grams, places = heads.trigrams(tokens), torch.arange(self.length, self.length + level + 1)
            own = heads.layer.keys(grams, places, heads.product)
            keys, values = (
                torch.cat([held.expand(n, -1, -1, -1), new], 1)
                for held, new in zip((self.keys, self.values), own, strict=True)
            )
            fast = heads.layer(grams[:, -1:], places[-1:], keys, values, None, heads.product)[:, 0]
            return heads.product(heads.features(level, last.expand(n, -1), fast), heads.words.weight)

        return guess
