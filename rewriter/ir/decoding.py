"""The protocols of draft-and-verify decoding: who steps the model, who drafts, who accepts, and who draws at random."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
        """Logits [nodes, V] of every row's tree; None stands for a row that has ended and gets [0, V].

        Behind those of the nodes stand those of the tree's probes, for a ProbingStepper; no other is given any.
        """

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep, of what was verified, the nodes of each row's path: ascending, the root first; empty for an ended row."""


class RollbackStepper(Stepper, Protocol):
    """A Stepper that can also take back what was committed: what a draft model needs, whose drafts may be refused."""

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row."""


class Blocks(Protocol):
    """The first blocks of a network over one sequence, with keys and values of their own."""

    def run(self, tokens: Sequence[int], column: int, blocks: range, stream: Tensor | None = None) -> Tensor:
        """The residual stream [n, ...] behind `blocks` of tokens that stand from a column of the sequence on.

        stream: what lies in front of the first of the blocks, None for block 0.  All tokens before must have run through the
        same blocks; those behind, if any, are forgotten.
        """


class OwnModel(Protocol):
    """The model that decodes a sequence, for a drafter that drafts with it.  Nothing it does changes what is decoded."""

    @property
    def blocks(self) -> int:
        """How many blocks the model has, one after another on its residual stream; they can be left out."""

    def skipping(self, tokens: Sequence[int], skip: Collection[int]) -> Tensor:
        """Logits [n, V] of a chain of tokens, the pending one first, without some blocks; nothing is kept."""

    def watch(self, block: int) -> None:
        """Ask for the stream in front of a block from the next pass on."""

    def stream(self, block: int, nodes: Sequence[int]) -> Tensor:
        """The stream [n, ...] in front of a watched block behind nodes of what was verified last, until the next pass."""

    def ahead(self, tokens: Sequence[int], place: int, blocks: int) -> Tensor:
        """The stream [n, ...] behind the first `blocks` blocks of tokens of a chain.

        place: of the first token; the pending one has 0.  They read the model's own keys and values, and leave theirs behind
        what is committed, until the next pass.
        """

    def copy(self, blocks: int, weights: Mapping[str, Tensor] | None = None) -> Blocks:
        """The first blocks with a state of their own that holds nothing yet, and with other weights by name where given."""


@runtime_checkable
class OwningStepper(Protocol):
    """A Stepper whose model can serve a drafter."""

    def own(self, row: int) -> OwnModel:
        """The model as one row decodes with it."""


@runtime_checkable
class RevealingStepper(Protocol):
    """A Stepper that can tell what its head of logits read."""

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor:
        """What the head of logits multiplies by its weight [V, d], behind nodes of one row's tree verified last: [n, d]."""


@runtime_checkable
class ProbingStepper(Protocol):
    """A Stepper that runs a tree's probes."""

    @property
    def probing(self) -> bool:
        """Whether it does."""


@runtime_checkable
class ReadingStepper(Protocol):
    """A Stepper that can also tell what its head of logits read in the prompt."""

    def read(self, row: int) -> Tensor | None:
        """The same behind the tokens of one row's prompt, [T, d]; None where rows shared its computation."""


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
    them, [n, d]; computed when it is asked for, until the next pass; None where the stepper cannot tell.  probed: the logits
    [n, V] of the tree's probes, None where there were none.
    """

    tree: DraftTree
    path: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: Tensor
    hidden: Callable[[Sequence[int]], Tensor] | None = None
    probed: Tensor | None = None


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

    def attach(self, own: OwnModel) -> None:
        """The model of this sequence."""


@runtime_checkable
class ReadingDrafting(Protocol):
    """A Drafting that goes on from what the model read in the prompt; without it, from what it reads later."""

    def read(self, hidden: Tensor) -> None:
        """What the model's head of logits read behind the tokens of the prompt, [T, d]."""


class Drafter(Protocol):
    """Proposes continuations; what it learns beyond one sequence stays in it.

    acceptance: the rule under which its drafts are exact for sampling.
    """

    @property
    def acceptance(self) -> AcceptanceRule:
        """The rule for sampled decoding; greedy decoding needs none of its own."""

    def start(self, tokens: Sequence[int], choice: Choice) -> Drafting:
        """Begin a sequence after its prompt and the first new token, which is pending."""
