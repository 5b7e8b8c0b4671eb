"""How each drafter is trained: from a model and a text that it has foretold to work, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from subquad.decoder import Decoder
from subquad.ir.errors import ConversionError
from subquad.passes.speculate.chimera import Chimera
from subquad.passes.speculate.falcon import Falcon
from subquad.passes.speculate.kangaroo import Kangaroo
from subquad.passes.speculate.prompt_tokens import PromptTokens
from subquad.passes.speculate.speculate import HEADS, Speculate, TrainedPart
from subquad.training.context_lessons import glancing, imitation
from subquad.training.foretold import Foretold
from subquad.training.heads import LEVELS, WIDTH, WORDS, HeadTraining, frequent
from subquad.training.kangaroo import KangarooTraining
from subquad.training.prompt_tokens import PromptTokenTraining, entry_width
from subquad.training.sequences import SequenceTraining

AHEAD = 3
"""Prompt tokens (PPD, §5)."""
APART = 1e-3
"""Spread of several copies of them at first, so that they can come to differ."""
EXIT = 2
"""Blocks in front of Kangaroo's adapter (paper, for 32 layers)."""


@dataclass(frozen=True)
class Material:
    """What there is to train with.

    model: the rewritten module, whose own weights stay as they are.  decoder: its decoder.  head: the weight of its head of
    logits [V, d].  text: what it foretold.  loop: the pass, with its knobs.
    """

    model: nn.Module
    decoder: Decoder
    head: Tensor
    text: Foretold
    loop: Speculate = field(default_factory=Speculate)


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


def _sizes(material: Material) -> tuple[int, Tensor, int]:
    """(d, the frequent tokens, the numbers that the words turn into scores: an even number)."""
    text, hidden = material.text, material.head.shape[1]
    return hidden, frequent(text.wanted[~text.asked], WORDS), min(WIDTH, hidden // 2 * 2)


def _heads(name: str) -> Recipe:
    def recipe(material: Material, seed: int) -> DrafterTraining:
        heads = HEADS[name](*_sizes(material), LEVELS).fitted(material.head)
        return HeadTraining(heads, material.text, seed)

    return recipe


def _chimera(material: Material, seed: int) -> DrafterTraining:
    heads = Chimera(*_sizes(material), LEVELS).fitted(material.head)
    return SequenceTraining(heads, material.text, imitation(heads), seed)


def _falcon(material: Material, seed: int) -> DrafterTraining:
    heads = Falcon(*_sizes(material), LEVELS, material.loop.draft_block).fitted(material.head)
    return SequenceTraining(heads, material.text, glancing(heads, material.head), seed)


def _ppd(material: Material, seed: int) -> DrafterTraining:
    text, loop = material.text, material.loop
    ids = frequent(text.wanted[~text.asked], AHEAD)
    ids = ids.repeat(AHEAD)[:AHEAD]
    added = torch.zeros(loop.prompt_copies, AHEAD, entry_width(material.decoder))
    if loop.prompt_copies > 1:
        added.normal_(0, APART)
    part = PromptTokens(ids, added, loop.prompt_mask, material.head.shape[0])
    return PromptTokenTraining(material.decoder, material.head, part, text, seed)


def _kangaroo(material: Material, seed: int) -> DrafterTraining:
    blocks = material.loop.early_exit or min(EXIT, _blocks(material) - 1)
    if not 0 < blocks < _blocks(material):
        raise ConversionError(
            f"a kangaroo drafter leaves the model behind block {blocks}, but its decoder has {_blocks(material)} that can be run "
            "apart; choose another early_exit or another method."
        )
    part = Kangaroo(material.head.shape[1], _sizes(material)[1], torch.tensor([blocks]))
    readout = material.decoder.engine.readout
    assert readout is not None
    part.begin(material.head, readout.reads)
    return KangarooTraining(part, material.decoder, material.text, seed)


def _blocks(material: Material) -> int:
    """Blocks of the decoder that can run apart from the others; none where states are recurrent."""
    return material.decoder.blocks if material.decoder.trees else 0


RECIPES: dict[str, Recipe] = {
    **{name: _heads(name) for name in HEADS},
    "chimera": _chimera,
    "falcon": _falcon,
    "ppd": _ppd,
    "kangaroo": _kangaroo,
}
"""By the word for the drafter; its keys are those of speculate.TRAINED."""
