"""Draft with nested sub-models, each token by the smallest one that is sure of it (S2D, Kavehzadeh et al. 2407.01955, §3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Blocks, Choice, OwnModel, Verified
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError
from subquad.passes.speculate.sample_and_descend import SampleAndDescend


class SubModels(Protocol):
    """Sub-models of ascending depth."""

    name: ClassVar[str]
    hidden: int
    weights: dict[str, Tensor]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks in front of each exit."""

    def best(self, stream: Tensor) -> tuple[int, float]:
        """The likeliest token behind a stream [1, d], and how likely it is."""


@dataclass(frozen=True, eq=False)
class SortedDrafter:
    """A chain of at most `tokens` argmax tokens.  An exit drafts a token that it finds likelier than `confidence`, the last one
    any; the paper's value is 0.5.

    A token that a shallow exit drafted has no keys in deeper blocks: they are made up for, all at once, when a deeper exit
    is asked next.
    """

    models: SubModels
    tokens: int = 6
    confidence: float = 0.5
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)

    def start(self, tokens: Sequence[int], choice: Choice) -> _Sorting:
        """A sequence; nothing outlives it."""
        return _Sorting(self, list(tokens))


class Nested:
    """How far the blocks in front of each exit have read a sequence, and what waits in front of them."""

    def __init__(self, blocks: Blocks, exits: Sequence[int]) -> None:
        self.blocks = blocks
        self.parts = [range(first, last) for first, last in zip((0, *exits), exits)]
        self.done = [0] * len(self.parts)
        self.waiting: list[Tensor | None] = [None] * len(self.parts)

    def read(self, part: int, tokens: Sequence[int]) -> Tensor:
        """Run the blocks of a part over all tokens that the part before has read; the stream [1, ...] behind the last one."""
        first = self.done[part]
        behind = self.blocks.run(tokens[first:], first, self.parts[part], self.waiting[part])
        self.done[part], self.waiting[part] = len(tokens), None
        if part + 1 < len(self.parts):
            before = self.waiting[part + 1]
            self.waiting[part + 1] = behind if before is None else torch.cat([before, behind])
        return behind[-1:]

    def cut(self, tokens: int) -> None:
        """Forget all but the first tokens of the sequence."""
        self.done = [min(done, tokens) for done in self.done]
        for part in range(1, len(self.parts)):
            waiting, left = self.waiting[part], self.done[part - 1] - self.done[part]
            self.waiting[part] = waiting[:left] if waiting is not None and left else None


@dataclass
class _Sorting:
    drafter: SortedDrafter
    tokens: list[int]
    _nested: Nested | None = None
    _drafted: tuple[int, ...] = ()

    def attach(self, own: OwnModel) -> None:
        """Draft with sub-models of this model."""
        models = self.drafter.models
        if own.blocks < models.blocks[-1]:
            raise GenerationError(
                f"the {models.name} drafter has {models.blocks[-1]} blocks, but the model's decoder has {own.blocks}; "
                "train one with a smaller early_exit."
            )
        self._nested = Nested(own.copy(models.blocks[-1], models.weights), models.blocks)

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The chain; each of its tokens is read by as many blocks as it takes."""
        chain, values = list(self.tokens), [1.0]
        with torch.inference_mode():
            while self._nested is not None and len(values) <= min(rows, depth, self.drafter.tokens):
                token, chance = self._next(self._nested, chain)
                chain.append(token)
                values.append(values[-1] * chance)
        self._drafted = tuple(chain[len(self.tokens) :])
        return DraftTree.chain((self.tokens[-1], *self._drafted), tuple(values))

    def _next(self, nested: Nested, tokens: Sequence[int]) -> tuple[int, float]:
        knobs, found = self.drafter, (0, 0.0)
        for part in range(len(nested.parts)):
            found = knobs.models.best(nested.read(part, tokens))
            if found[1] > knobs.confidence:
                break
        return found

    def observe(self, result: Verified) -> None:
        """Forget what was drafted and not committed."""
        agreed = 0
        while agreed < min(len(self._drafted), len(result.tokens)) and self._drafted[agreed] == result.tokens[agreed]:
            agreed += 1
        kept = len(self.tokens) + min(agreed, len(result.tokens) - 1)  # the pending token is always read again
        if self._nested is not None:
            self._nested.cut(kept)
        self.tokens += result.tokens
        self._drafted = ()
