"""Draft with the first blocks of the model itself and an adapter; its own keys and values serve (Kangaroo, 2404.18911, §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, OwnModel, Verified
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError
from subquad.passes.speculate.sample_and_descend import SampleAndDescend

GRAIN = 256
"""Tokens by which the adapter's memory grows."""


class Adapter(Protocol):
    """What makes a draft model of the first `blocks` blocks."""

    name: ClassVar[str]
    hidden: int

    @property
    def blocks(self) -> int:
        """The model's blocks in front of it."""

    def project(self, stream: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [H, n, D] of tokens from the place `first` on; stream: [n, d]."""

    def mix(self, stream: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """The stream [n, d] behind the adapter."""

    def best(self, stream: Tensor) -> tuple[int, float]:
        """The likeliest token behind [1, d], and how likely it is."""


@dataclass(frozen=True, eq=False)
class EarlyExitDrafter:
    """A chain of at most `tokens` argmax tokens; it ends behind a token less likely than `confidence`, the second exit.

    The paper's values are 6 tokens and 0.6.  The blocks read and write the model's own keys and values, behind those that
    are committed; what they did to accepted tokens comes from the pass that verified them.
    """

    adapter: Adapter
    tokens: int = 6
    confidence: float = 0.6
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)

    def start(self, tokens: Sequence[int], choice: Choice) -> _Exiting:
        """A sequence; nothing outlives it."""
        return _Exiting(self, tokens[:-1], tokens[-1])


class Memory:
    """Keys and values [H, T, D] of the adapter; what stands behind `length` is a draft's."""

    def __init__(self) -> None:
        self.length = 0
        self._parts: list[Tensor] = []

    def write(self, first: int, parts: Sequence[Tensor]) -> None:
        """Put keys and values [H, n, D] to the places from `first` on."""
        end = first + parts[0].shape[-2]
        held = self._parts[0].shape[1] if self._parts else 0
        if end > held:
            room = -(-max(end, held * 3 // 2) // GRAIN) * GRAIN
            grown = [part.new_zeros(part.shape[0], room, part.shape[2]) for part in parts]
            for new, old in zip(grown, self._parts, strict=bool(self._parts)):
                new[:, :held] = old
            self._parts = grown
        for own, part in zip(self._parts, parts, strict=True):
            own[:, first:end] = part

    def read(self, end: int) -> list[Tensor]:
        """Keys and values of the first `end` places."""
        return [part[:, :end] for part in self._parts]


@dataclass
class _Exiting:
    drafter: EarlyExitDrafter
    prompt: Sequence[int]
    last: int
    _own: OwnModel | None = None
    _memory: Memory = field(default_factory=Memory)

    def attach(self, own: OwnModel) -> None:
        """Draft with this model: the adapter reads the prompt."""
        adapter = self.drafter.adapter
        if own.blocks <= adapter.blocks:
            raise GenerationError(
                f"the {adapter.name} drafter leaves the model behind block {adapter.blocks}, but its decoder has {own.blocks}; "
                "train one with a smaller early_exit."
            )
        self._own = own
        own.watch(adapter.blocks)
        if self.prompt:
            self._learn(own.copy(adapter.blocks).run(self.prompt, 0, range(adapter.blocks)))

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The chain; each of its tokens runs through the first blocks and the adapter."""
        knobs, chain, values = self.drafter, [self.last], [1.0]
        adapter, memory = knobs.adapter, self._memory
        with torch.inference_mode():
            while self._own is not None and len(chain) <= min(rows, depth, knobs.tokens):
                stream = self._own.ahead(chain[-1:], len(chain) - 1, adapter.blocks)
                place = memory.length + len(chain) - 1
                q, *parts = adapter.project(stream, place)
                memory.write(place, parts)
                k, v = memory.read(place + 1)
                token, chance = adapter.best(adapter.mix(stream, q, k, v, causal=False))
                chain.append(token)
                values.append(values[-1] * chance)
                if chance < knobs.confidence:
                    break
        return DraftTree.chain(tuple(chain), tuple(values))

    def observe(self, result: Verified) -> None:
        """Keep what the first blocks made of the tokens that stand now, whoever drafted them."""
        if self._own is not None:
            self._learn(self._own.stream(self.drafter.adapter.blocks, result.path))
        self.last = result.tokens[-1]

    def _learn(self, stream: Tensor) -> None:
        adapter, memory = self.drafter.adapter, self._memory
        if stream.shape[1:] != (adapter.hidden,):
            raise GenerationError(
                f"the {adapter.name} drafter reads a stream of width {adapter.hidden}, but the model's is "
                f"{list(stream.shape[1:])}; use another method."
            )
        with torch.inference_mode():
            memory.write(memory.length, adapter.project(stream, memory.length)[1:])
            memory.length += stream.shape[0]
