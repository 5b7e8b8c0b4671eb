"""Drafts by a smaller model, token after token (speculative sampling, Leviathan et al. 2211.17192, Chen et al. 2302.01318)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, OpenStepper, RollbackStepper, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.speculative_sampling import SpeculativeSampling


@dataclass(frozen=True)
class DraftModel:
    """A chain of at most `tokens` tokens from a model with the same tokenizer: its argmax when decoding is greedy, else drawn.

    open: a fresh stepper of the draft model.  vocabulary: size of the target's logits.  confidence: the chain ends behind a
    token that the draft model finds less likely than this (Hugging Face's assistant_confidence_threshold; the unlikely token
    itself stays, or the draft would no longer have the law it was drawn from).
    """

    open: OpenStepper
    vocabulary: int
    tokens: int = 5
    confidence: float = 0.4
    acceptance: AcceptanceRule = field(default_factory=SpeculativeSampling)

    def start(self, tokens: Sequence[int], choice: Choice) -> _Chain:
        """The draft model reads the prompt."""
        return _Chain(self, list(tokens), choice, read(self.open, tokens))


def read(open_stepper: OpenStepper, tokens: Sequence[int]) -> RollbackStepper:
    """A stepper that has all tokens but the last one, which is pending."""
    stepper = open_stepper()
    stepper.prefill(torch.tensor([list(tokens[:-1])]), None)
    return stepper


def law_of(logits: Tensor, tokens: Sequence[int], choice: Choice, vocabulary: int) -> Tensor:
    """The draft's law float64 [vocabulary] after tokens: its logits [1, V] under the target's own processors.

    Ids that the target lacks get no mass, ids that the draft model lacks neither.
    """
    scores = torch.full((1, vocabulary), -torch.inf)
    shared = min(vocabulary, logits.shape[-1])
    scores[:, :shared] = logits[:, :shared].to(torch.float32)
    prefix = torch.tensor([list(tokens)])
    for processor in choice.processors:
        scores = processor(prefix, scores)
    return scores[0].double().softmax(-1)


@dataclass
class _Chain:
    drafter: DraftModel
    tokens: list[int]
    choice: Choice
    stepper: RollbackStepper
    _drafted: tuple[int, ...] = ()
    _fed: int = 0
    _unread: int = 1

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The draft model steps behind the pending token; its state then also holds all drafted tokens but the last."""
        knobs, tokens = self.drafter, list(self.tokens)
        laws: list[Tensor | None] = []
        feed = tokens[-self._unread :]
        self._fed = -1
        while len(laws) < min(rows, depth, knobs.tokens):
            logits = self.stepper.verify([DraftTree.chain(tuple(feed))])[0][-1:]
            self.stepper.commit([range(len(feed))])
            self._fed += 1
            law = law_of(logits, tokens, self.choice, knobs.vocabulary)
            token = int(law.argmax()) if self.choice.greedy else self.choice.chance.pick(law[None])
            laws.append(law)
            tokens.append(token)
            feed = [token]
            if law[token] < knobs.confidence:
                break
        self._drafted = tuple(tokens[len(self.tokens) :])
        drawn = () if self.choice.greedy else (*laws, None)
        return DraftTree.chain((self.tokens[-1], *self._drafted), laws=drawn)

    def observe(self, result: Verified) -> None:
        """Take drafted tokens that were not committed out of the draft model's state."""
        agreed = 0
        while agreed < min(len(self._drafted), len(result.tokens)) and self._drafted[agreed] == result.tokens[agreed]:
            agreed += 1
        self.tokens += result.tokens
        if self._fed < 0:
            self._unread += len(result.tokens)
            return
        kept = min(agreed, self._fed, len(result.tokens) - 1)
        if self._fed > kept:
            self.stepper.rollback([self._fed - kept])
        self._unread = len(result.tokens) - kept
        self._drafted, self._fed = (), -1
