"""How each drafter is trained: from a model and a text that it has foretold to work, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from subquad.decoder import Decoder
from subquad.passes.speculate.speculate import HEADS, TrainedPart
from subquad.training.foretold import Foretold
from subquad.training.heads import LEVELS, WIDTH, WORDS, HeadTraining, frequent


@dataclass(frozen=True)
class Material:
    """What there is to train with.

    model: the rewritten module, whose own weights stay as they are.  decoder: its decoder.  head: the weight of its head of
    logits [V, d].  text: what it foretold.
    """

    model: nn.Module
    decoder: Decoder
    head: Tensor
    text: Foretold


class DrafterTraining(Protocol):
    """The training of one drafter.  size: tokens of a batch."""

    batches: int
    size: int

    @property
    def part(self) -> TrainedPart:
        """What is trained."""

    def work(self, number: int) -> dict[str, float]:
        """Train on batch `number`; returns the losses to show."""

    def guessed(self) -> list[float]:
        """For every level, the share of held-out tokens that its best guess hits."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""


Recipe = Callable[[Material, int], DrafterTraining]
"""(material, seed) → the training, before its first batch; torch's generator has that seed, for initial values."""


def _heads(name: str) -> Recipe:
    def recipe(material: Material, seed: int) -> DrafterTraining:
        text, head = material.text, material.head
        ids = frequent(text.wanted[~text.asked], WORDS)
        heads = HEADS[name](head.shape[1], ids, min(WIDTH, head.shape[1]), LEVELS).fitted(head)
        return HeadTraining(heads, text, seed)

    return recipe


RECIPES: dict[str, Recipe] = {name: _heads(name) for name in HEADS}
"""By the word for the drafter; its keys are those of speculate.TRAINED."""
