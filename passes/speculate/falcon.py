"""Falcon: a drafter that guesses k tokens in one of its passes, with relaxed causal attention (Gao et al. 2412.12639, §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from subquad.passes.speculate.context_heads import REACH, ContextHeads
from subquad.passes.speculate.context_layer import ContextLayer
from subquad.passes.speculate.draft_heads import stacked
from subquad.passes.speculate.likeliest_tree import Guess

Memory = tuple[Tensor, Tensor]
"""State of the LSTM, two of [layers, n, w]."""


class Falcon(ContextHeads):
    """Row j reads h_j with the token behind it, and guesses what k places on the model's head will read, and so the token there.

    The rows pass an LSTM of two layers and one of attention, in which a row sees all rows before and, of its own block of k,
    also those behind.  The last k rows are a block; their guesses, with the tokens drafted from them, are the rows of the
    next block.  Within a block a guess knows nothing of the other drafted tokens, so that the tree has, in every k levels, the
    best of a cartesian product (the paper's decoding tree, sized by probabilities here).  The paper's layers are as wide as
    the model; these have `width` numbers, and a linear way around them from the last row of a block to each of its guesses.
    """

    name: ClassVar[str] = "falcon"
    block: Tensor
    depth: Tensor

    def __init__(self, hidden: int, ids: Tensor, width: int, levels: int, block: int = 2) -> None:
        """block: k."""
        super().__init__(hidden, ids, width, levels)
        self.register_buffer("block", torch.tensor(block))
        self.register_buffer("depth", torch.tensor(levels))
        self.lstm = nn.LSTM(2 * hidden, width, num_layers=2, batch_first=True)
        self.layer = ContextLayer(width)
        self.around = stacked(block, lambda row: 2 * hidden, width)
        self.foreseen = nn.Linear(width, hidden, bias=False)
        self.k = block

    @classmethod
    def count(cls, names: Mapping[str, Tensor]) -> int:
        """The levels that stored parameters are of."""
        return int(names["depth"])

    @classmethod
    def shaped(cls, parameters: Mapping[str, Tensor], hidden: int, ids: Tensor, width: int) -> Self:
        """One with the stored block."""
        return cls(hidden, ids, width, cls.count(parameters), int(parameters["block"]))

    def begin(self, start: Tensor) -> None:
        """Rows that guess what the model itself did, and foresee what it read."""
        with torch.no_grad():
            for around in self.around:
                around[:, : self.hidden].copy_(start)
            self.foreseen.weight.copy_(start.T)

    def rows(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """[..., n, 2d] of what was read [..., n, d] and the tokens int64 [..., n] behind it."""
        return torch.cat([hidden.to(self.words.weight.dtype), self.embedded(tokens)], -1)

    def remembered(self, rows: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """[B, n, w] of the LSTM, and its state behind the last row."""
        out, state = self.lstm(rows, memory)
        return out, state

    def along(self, hidden: Tensor, tokens: Tensor, offset: int = 0) -> Tensor:
        """[B, T, w] of every row of texts, which turns into scores and into what is foreseen.

        hidden: [B, T, d].  tokens: int64 [B, T], those behind each place.  offset: places in front of the first whole block.
        """
        rows = self.rows(hidden, tokens)
        stream, _ = self.remembered(rows, None)
        places = torch.arange(rows.shape[1])
        numbers = (places - offset).div(self.k, rounding_mode="floor")
        keys, values = self.layer.keys(stream, places, self.product)
        seen = numbers[None, :] <= numbers[:, None]
        out = self.layer(stream, places, keys, values, seen, self.product)
        last = rows[:, ((numbers + 1) * self.k + offset - 1).clamp_max(len(places) - 1)]
        turns = (places - offset) % self.k
        for turn, around in enumerate(self.around):
            out = out + self.product(last, around) * (turns == turn)[:, None]
        return out

    def past(self, last: Tensor) -> Tensor:
        """[..., k, w] that goes around the layers to a block's guesses, from its last row [..., 2d]."""
        return torch.stack([self.product(last, around) for around in self.around], -2)

    def opened(self) -> _Context:
        """An empty context."""
        return _Context(self)


@dataclass(frozen=True)
class _Block:
    """k rows behind a path: found [k, w]; the state behind them; keys and values [n, H, w / H] of all drafted rows so far."""

    found: Tensor
    memory: Memory
    keys: Tensor
    values: Tensor


class _Context:
    """keys, values: of the committed rows; streams: of the last k of them; waiting: what was read behind the last token."""

    def __init__(self, heads: Falcon) -> None:
        self.heads = heads
        like, layer = heads.words.weight, heads.layer
        self.keys = self.values = like.new_empty(0, layer.heads, heads.width // layer.heads)
        self.streams = like.new_empty(0, heads.width)
        self.memory: Memory | None = None
        self.length = 0
        self.waiting: Tensor | None = None

    def add(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Each token completes the row of the one before it."""
        if not tokens:
            return
        read = hidden[:-1] if self.waiting is None else torch.cat([self.waiting, hidden[:-1]])
        if len(read):
            behind = torch.tensor(list(tokens[len(tokens) - len(read) :]))
            _, self.streams, self.keys, self.values, self.memory = self._passed(read, behind)
            self.length += len(read)
        self.waiting = hidden[-1:]

    def _passed(self, read: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Memory]:
        """(the last row, streams, keys, values, memory) with more committed rows."""
        heads = self.heads
        rows = heads.rows(read, tokens)
        stream, memory = heads.remembered(rows[None], self.memory)
        places = torch.arange(self.length, self.length + len(rows))
        found = heads.layer.keys(stream[0], places, heads.product)
        keys, values = (torch.cat(pair)[-REACH:] for pair in zip((self.keys, self.values), found, strict=True))
        streams = torch.cat([self.streams, stream[0]])[-heads.k :]
        return rows[-1], streams, keys, values, memory

    def guesses(self, pending: int) -> Guess | None:
        """A block is run for all paths that lead to it and were not met before."""
        heads = self.heads
        if self.waiting is None or self.length + 1 < heads.k:
            return None
        last, streams, keys, values, memory = self._passed(self.waiting, torch.tensor([pending]))
        length, k = self.length + 1, heads.k
        places = torch.arange(length - k, length)
        out = heads.layer(streams[None], places, keys[None], values[None], None, heads.product)[0]
        root = _Block(out + heads.past(last), memory, keys[:0], values[:0])
        blocks: dict[tuple[int, ...], _Block] = {(): root}

        def extend(paths: list[tuple[int, ...]]) -> None:
            """Blocks behind paths of one length."""
            before = [blocks[path[:-k]] for path in paths]
            read = torch.stack([heads.product(block.found, heads.foreseen.weight) for block in before])
            more = heads.rows(read, torch.tensor([path[-k:] for path in paths]))
            past = tuple(torch.cat([block.memory[n] for block in before], 1) for n in range(2))
            stream, after = heads.remembered(more, past)  # type: ignore[arg-type]
            at = torch.arange(length + len(paths[0]) - k, length + len(paths[0]))
            own = heads.layer.keys(stream, at, heads.product)
            drafted = [
                torch.cat([torch.stack([getattr(block, side) for block in before]), new], 1)
                for side, new in zip(("keys", "values"), own, strict=True)
            ]
            whole = [
                torch.cat([held.expand(len(paths), -1, -1, -1), new], 1)
                for held, new in zip((keys, values), drafted, strict=True)
            ]
            found = heads.layer(stream, at, whole[0], whole[1], None, heads.product)
            found = found + heads.past(more[:, -1])
            for n, path in enumerate(paths):
                state = (after[0][:, n : n + 1], after[1][:, n : n + 1])
                blocks[path] = _Block(found[n], state, drafted[0][n], drafted[1][n])

        def guess(level: int, paths: Tensor) -> Tensor:
            known = [tuple(path[: level // k * k]) for path in paths.tolist()]
            missing = [path for path in dict.fromkeys(known) if path not in blocks]
            for depth in range(k, level // k * k + 1, k):
                if short := [p for p in dict.fromkeys(path[:depth] for path in missing) if p not in blocks]:
                    extend(short)
            return heads.product(torch.stack([blocks[path].found[level % k] for path in known]), heads.words.weight)

        return guess
