"""The protocols of draft-and-verify decoding: who steps the model, who drafts, who accepts, and who draws at random."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from subquad.ir.draft import DraftTree

Processor = Callable[[Tensor, Tensor], Tensor]
"""(prefix ids int64 [1, t], scores float32 [1, V]) → scores [1, V]; Hugging Face's LogitsProcessor is one."""


class Stepper(Protocol):
    """A model with the state of one call.  Every `verify` is followed by one `commit`.

    trees: False when only chains can be verified.  limit: most tokens that the model's position tables allow.
    """

    @property
    def trees(self) -> bool:
        """Whether drafts may branch."""

    @property
    def limit(self) -> int | None:
        """Most tokens per row, None without limit."""

    def prefill(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, V] behind the last token of prompts int64 [B, T], padded on the left where the mask is 0."""

    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor]:
        """Logits [nodes, V] of every row's tree; None stands for a row that has ended and gets [0, V]."""

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep, of what was verified, the nodes of each row's path: ascending, the root first; empty for an ended row."""


class RollbackStepper(Stepper, Protocol):
    """A Stepper that can also take back what was committed: what a draft model needs, whose drafts may be refused."""

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row."""


Shortcut = Callable[[Sequence[int], Collection[int]], Tensor]
"""(chain of tokens, the pending one first; numbers of the blocks to leave out) → logits [n, V] behind them.  Nothing is kept."""


@runtime_checkable
class SkippingStepper(Protocol):
    """A Stepper whose model can run without some of its blocks."""

    @property
    def blocks(self) -> int:
        """How many blocks the model has that can be left out; 0 when it cannot do without any."""

    def skipping(self, row: int, tokens: Sequence[int], skip: Collection[int]) -> Tensor:
        """Logits [n, V] of a chain behind one row without some blocks; nothing is pending afterwards."""


@runtime_checkable
class RevealingStepper(Protocol):
    """A Stepper that can tell what its head of logits read."""

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor:
        """What the head of logits multiplies by its weight [V, d], behind nodes of one row's tree verified last: [n, d]."""


OpenStepper = Callable[[], RollbackStepper]
"""Makes a stepper that holds nothing yet."""


class Chance(Protocol):
    """The source of randomness, so that a rule can be run on every outcome as well as on random ones."""

    def happens(self, probability: float) -> bool:
        """One Bernoulli trial."""

    def pick(self, weights: Tensor) -> int:
        """One index drawn from non-negative weights [1, V]."""

    def uniform(self, count: int) -> Tensor:
        """float64 [count] between 0 and 1."""


class AcceptanceRule(Protocol):
    """Emits the token that follows a node: of exactly the law of the scores, whatever was drafted.

    The walk goes on at the child that carries the token, and ends where there is none.
    """

    def emit(self, scores: Tensor, tree: DraftTree, node: int, chance: Chance) -> int:
        """The token after `node`; scores: processed logits float [1, V], −inf where forbidden."""


@dataclass(frozen=True)
class Verified:
    """What one pass settled for one sequence.

    tree: what was verified.  path: the accepted nodes, the root first.  tokens: what was committed, in order; the last one is
    pending now.  logits: the model's unprocessed logits [nodes, V].  hidden: nodes → what the head of logits read behind
    them, [n, d]; computed when it is asked for, until the next pass; None where the stepper cannot tell.
    """

    tree: DraftTree
    path: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: Tensor
    hidden: Callable[[Sequence[int]], Tensor] | None = None


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen: the processors in order, whether the largest score wins or one is drawn, and by what chance.

    by_row: the processors of each row of a batch where they differ.
    """

    processors: tuple[Processor, ...]
    greedy: bool
    chance: Chance
    by_row: tuple[tuple[Processor, ...], ...] = ()

    def of_row(self, row: int) -> Choice:
        """How the tokens of one row are chosen."""
        return replace(self, processors=self.by_row[row], by_row=()) if self.by_row else self


class Drafting(Protocol):
    """The drafter's state for one sequence; a function of committed tokens only."""

    def propose(self, rows: int, depth: int) -> DraftTree:
        """At most `rows` nodes below the pending token, none deeper than `depth`; the root alone when nothing is known."""

    def observe(self, result: Verified) -> None:
        """Learn what was committed."""


@runtime_checkable
class SelfDrafting(Protocol):
    """A Drafting that drafts with the model itself; without it, it drafts nothing."""

    def attach(self, blocks: int, run: Shortcut) -> None:
        """The model of this sequence, and how many blocks it has."""


class Drafter(Protocol):
    """Proposes continuations; what it learns beyond one sequence stays in it.

    acceptance: the rule under which its drafts are exact for sampling.
    """

    @property
    def acceptance(self) -> AcceptanceRule:
        """The rule for sampled decoding; greedy decoding needs none of its own."""

    def start(self, tokens: Sequence[int], choice: Choice) -> Drafting:
        """Begin a sequence after its prompt and the first new token, which is pending."""
