"""Draft-and-verify decoding over any Stepper: with empty drafts it is plain decoding, token by token."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subquad.ir.decoding import (
    AcceptanceRule,
    Choice,
    Drafter,
    Drafting,
    OwningStepper,
    ProbingStepper,
    ReadingDrafting,
    ReadingStepper,
    RevealingStepper,
    SelfDrafting,
    Stepper,
    Verified,
)
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError
from subquad.kernels.largest import first_largest
from subquad.runtime.pacing import FixedPacing, Pacing

Stop = Callable[[int, Tensor, Tensor], bool]
"""(row, prefix ids int64 [1, t], scores [1, V]) → whether the row ends with the prefix's last token."""


WHOLE = FixedPacing(7)


@dataclass(frozen=True)
class Emission:
    """One new token with the model's logits [V] it was chosen from, and the same processed, [1, V]."""

    token: int
    logits: Tensor
    processed: Tensor

    @property
    def scores(self) -> Tensor:
        """What was processed, float32 [1, V]."""
        return self.processed.to(torch.float32)


@dataclass(frozen=True)
class Pass:
    """What one pass of the model gave: new tokens per row, which rows have ended, nodes verified, seconds in all and for
    drafting."""

    emitted: tuple[tuple[Emission, ...], ...]
    ended: tuple[bool, ...]
    verified: int
    seconds: float
    draft_seconds: float


@dataclass(frozen=True)
class Ending:
    """When rows end: after so many new tokens, with an id of `ids`, or when a stop says so; tested after every token."""

    max_new_tokens: int
    ids: Collection[int] = ()
    stops: tuple[Stop, ...] = ()


class _Row:
    """One sequence: its ids, so that processors and stops see the true prefix of every token, and its drafts."""

    def __init__(self, number: int, ids: Tensor, ending: Ending, choice: Choice, rule: AcceptanceRule) -> None:
        """ids: int64 [1, T + max_new_tokens], filled up to T."""
        self.number, self.ids, self.ending, self.choice, self.rule = number, ids, ending, choice, rule
        self.length = ids.shape[1] - ending.max_new_tokens
        self.ended = False
        self.drafting: Drafting | None = None
        self._as_they_are = choice.greedy and not choice.processors and not ending.stops

    @property
    def pending(self) -> DraftTree:
        """The last token without a draft."""
        return DraftTree((int(self.ids[0, self.length - 1]),), (-1,))

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.ids.shape[1] - self.length

    def walk(self, tree: DraftTree, logits: Tensor) -> tuple[list[int], list[Emission]]:
        """Descend from the root as far as tokens agree: the accepted nodes and one more token than nodes below the root."""
        node: int | None = 0
        path: list[int] = []
        found: list[Emission] = []
        while node is not None and not self.ended:
            path.append(node)
            prefix = self.ids[:, : self.length]
            raw = logits[node : node + 1]
            scores = raw if self._as_they_are else raw.to(torch.float32, copy=bool(self.choice.processors))
            for processor in self.choice.processors:
                scores = processor(prefix, scores)
            self._check(scores)
            token = self.rule.emit(scores, tree, node, self.choice.chance)
            self.ids[0, self.length] = token
            self.length += 1
            found.append(Emission(token, raw[0], scores))
            self.ended = self._ends(token, scores)
            node = tree.child(node, token)
        return path, found

    def _check(self, scores: Tensor) -> None:
        best = first_largest(scores)
        if best is None or (not self.choice.greedy and float(scores[0, best]) == -torch.inf):
            found = "NaN" if best is None else "no allowed token"
            raise GenerationError(
                f"the scores of row {self.number} after {self.length} tokens hold {found}; look at the model's weights, its "
                "dtype and the logits processors."
            )

    def _ends(self, token: int, scores: Tensor) -> bool:
        if self.room == 0 or token in self.ending.ids:
            return True
        prefix = self.ids[:, : self.length]
        return any(stop(self.number, prefix, scores) for stop in self.ending.stops)


def speculate(
    stepper: Stepper, ids: Tensor, attention_mask: Tensor | None, *, choice: Choice, plain: AcceptanceRule,
    ending: Ending, drafter: Drafter | None = None, pacing: Pacing = WHOLE,
) -> Iterator[Pass]:  # fmt: skip
    """Decode prompts ids int64 [B, T], padded on the left where attention_mask is 0; yields what each pass of the model gave.

    plain: the rule for greedy decoding and without a drafter; sampling uses the drafter's own.  drafter: None is plain
    decoding.  pacing: how many drafted tokens are verified.  The tokens are those of plain decoding (greedy) or have its law.
    """
    rule = plain if choice.greedy or drafter is None else drafter.acceptance
    rows = _rows(ids, ending, choice, rule)
    prompts = [_real(ids[n], None if attention_mask is None else attention_mask[n]) for n in range(len(rows))]
    start = time.perf_counter()
    first = stepper.prefill(ids, attention_mask)
    emitted = [row.walk(row.pending, first[n : n + 1])[1] for n, row in enumerate(rows)]
    yield Pass(tuple(map(tuple, emitted)), _ended(rows), len(rows), time.perf_counter() - start, 0.0)
    if drafter is not None:
        for row, prompt, new in zip(rows, prompts, emitted, strict=True):
            row.drafting = None if row.ended else drafter.start((*prompt, new[0].token), row.choice)
            if isinstance(row.drafting, SelfDrafting) and isinstance(stepper, OwningStepper):
                own = stepper.own(row.number)
                if own.blocks:
                    row.drafting.attach(own)
            if isinstance(row.drafting, ReadingDrafting) and isinstance(stepper, ReadingStepper):
                hidden = stepper.read(row.number)
                if hidden is not None:
                    row.drafting.read(hidden)
    reveal = stepper.hidden if isinstance(stepper, RevealingStepper) else None
    while not all(row.ended for row in rows):
        start = time.perf_counter()
        trees = _trees(rows, stepper, pacing, first.shape[-1])
        drafted = time.perf_counter()
        verified = stepper.verify(trees)
        walked = [
            ([], []) if tree is None else row.walk(tree, verified[n]) for n, (row, tree) in enumerate(zip(rows, trees))
        ]
        stepper.commit([path for path, _ in walked])
        done = time.perf_counter()
        for row, tree, (path, new), logits in zip(rows, trees, walked, verified, strict=True):
            if row.drafting is not None and tree is not None and not row.ended:
                hidden = functools.partial(reveal, row.number) if reveal is not None else None
                tokens, nodes = tuple(e.token for e in new), len(tree)
                probed = logits[nodes:] if len(logits) > nodes else None
                row.drafting.observe(Verified(tree, tuple(path), tokens, logits[:nodes], hidden, probed))
        end = time.perf_counter()
        pacing.record(trees, sum(len(new) for _, new in walked), end - start)
        fed = sum(tree.rows for tree in trees if tree is not None)
        yield Pass(tuple(tuple(new) for _, new in walked), _ended(rows), fed, end - start, end - done + drafted - start)


def _ended(rows: list[_Row]) -> tuple[bool, ...]:
    return tuple(row.ended for row in rows)


def _rows(ids: Tensor, ending: Ending, choice: Choice, rule: AcceptanceRule) -> list[_Row]:
    batch, length = ids.shape
    buffer = ids.new_zeros(batch, length + ending.max_new_tokens)
    buffer[:, :length] = ids
    return [_Row(n, buffer[n : n + 1], ending, choice.of_row(n), rule) for n in range(batch)]


def _real(ids: Tensor, mask: Tensor | None) -> Sequence[int]:
    found: list[int] = (ids if mask is None else ids[mask != 0]).tolist()
    return found


def _trees(rows: list[_Row], stepper: Stepper, pace: Pacing, vocabulary: int) -> list[DraftTree | None]:
    allowed = pace.allowance(sum(not row.ended for row in rows))
    found: list[DraftTree | None] = []
    for row in rows:
        if row.ended:
            found.append(None)
            continue
        limit = allowed if stepper.limit is None else min(allowed, stepper.limit - row.length)
        if row.drafting is None or limit <= 0 or row.room <= 1:
            found.append(row.pending)
            continue
        tree = row.drafting.propose(limit, row.room - 1)
        _check(tree, row, vocabulary)
        tree = tree.within(row.room - 1) if stepper.trees else tree.first_path().within(row.room - 1)
        if tree.probes is not None and not (isinstance(stepper, ProbingStepper) and stepper.probing):
            tree = replace(tree, probes=None)
        found.append(tree if tree.laws else tree.first(1 + limit))
    return pace.cut(found)


def _check(tree: DraftTree, row: _Row, vocabulary: int) -> None:
    if tree.tokens[0] != int(row.ids[0, row.length - 1]):
        raise GenerationError(
            f"the draft begins with token {tree.tokens[0]}, which is not the last one of row {row.number}."
        )
    if max(tree.tokens) >= vocabulary or min(tree.tokens) < 0:
        raise GenerationError(
            f"the drafter proposed token {max(tree.tokens)}, but the model has {vocabulary} tokens; "
            "use a drafter for the same tokenizer."
        )
