"""The processors of logits that decoding offers by name; each is the function that Hugging Face's of that name computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ir.decoding import Processor
from subquad.ir.errors import GenerationError

FORBIDDEN = -torch.inf


@dataclass(frozen=True)
class Temperature:
    """scores / temperature."""

    temperature: float

    def __call__(self, prefix: Tensor, scores: Tensor) -> Tensor:
        """prefix int64 [1, t], scores float [1, V]."""
        return scores / self.temperature


@dataclass(frozen=True)
class TopK:
    """The k largest scores; all that equal the k-th stay."""

    k: int

    def __call__(self, prefix: Tensor, scores: Tensor) -> Tensor:
        """prefix int64 [1, t], scores float [1, V]."""
        least = scores.topk(min(self.k, scores.shape[-1]), -1).values[:, -1:]
        return scores.masked_fill(scores < least, FORBIDDEN)


@dataclass(frozen=True)
class TopP:
    """The smallest set of tokens whose probabilities reach p (nucleus sampling, Holtzman et al. 1904.09751)."""

    p: float

    def __call__(self, prefix: Tensor, scores: Tensor) -> Tensor:
        """prefix int64 [1, t], scores float [1, V]."""
        ordered, places = scores.sort(-1)
        beyond = ordered.softmax(-1).cumsum(-1) <= 1 - self.p
        beyond[:, -1:] = False
        return scores.masked_fill(torch.zeros_like(beyond).scatter(-1, places, beyond), FORBIDDEN)


@dataclass(frozen=True)
class MinP:
    """Tokens at least `fraction` times as likely as the likeliest one (Nguyen et al. 2407.01082)."""

    fraction: float

    def __call__(self, prefix: Tensor, scores: Tensor) -> Tensor:
        """prefix int64 [1, t], scores float [1, V]."""
        law = scores.softmax(-1)
        return scores.masked_fill(law < self.fraction * law.amax(-1, keepdim=True), FORBIDDEN)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Scores of tokens that occur in the prefix are divided by the penalty, multiplied where negative (CTRL, 1909.05858)."""

    penalty: float

    def __call__(self, prefix: Tensor, scores: Tensor) -> Tensor:
        """prefix int64 [1, t], scores float [1, V]."""
        seen = scores.gather(1, prefix)
        return scores.scatter(1, prefix, torch.where(seen < 0, seen * self.penalty, seen / self.penalty))


@dataclass(frozen=True)
class NoRepeatNgram:
    """No token that would complete an n-gram which the prefix already holds."""

    size: int

    def __call__(self, prefix: Tensor, scores: Tensor) -> Tensor:
        """prefix int64 [1, t], scores float [1, V]."""
        ids = prefix[0]
        if ids.shape[0] + 1 < self.size:
            return scores
        grams = ids.unfold(0, self.size, 1) if ids.shape[0] >= self.size else ids.new_zeros(0, self.size)
        again = (grams[:, :-1] == ids[ids.shape[0] - self.size + 1 :]).all(-1)
        return scores.index_fill(1, grams[again, -1], FORBIDDEN)


def processors(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
) -> tuple[Processor, ...]:  # fmt: skip
    """The processors of these knobs in Hugging Face's order: penalties, then temperature, top-k, top-p, min-p.

    Temperature 0 is greedy and leaves out those that only shape a distribution.  Raises GenerationError for a value that a
    knob cannot take.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise GenerationError("temperature and top_k must be at least 0, and top_p in (0, 1].")
    if not 0 <= min_p <= 1 or repetition_penalty <= 0 or no_repeat_ngram_size < 0:
        raise GenerationError(
            "min_p must be in [0, 1], repetition_penalty above 0, and no_repeat_ngram_size at least 0."
        )
    found: list[Processor] = []
    if repetition_penalty != 1:
        found.append(RepetitionPenalty(repetition_penalty))
    if no_repeat_ngram_size:
        found.append(NoRepeatNgram(no_repeat_ngram_size))
    if temperature:
        if temperature != 1:
            found.append(Temperature(temperature))
        if top_k:
            found.append(TopK(top_k))
        if top_p < 1:
            found.append(TopP(top_p))
        if min_p:
            found.append(MinP(min_p))
    return tuple(found)
