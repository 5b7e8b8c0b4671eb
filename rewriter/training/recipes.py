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
from subquad.passes.speculate.s2d import S2D
from subquad.passes.speculate.speculate import HEADS, Speculate, TrainedPart
from subquad.training.context_lessons import glancing, imitation
from subquad.training.foretold import Foretold
from subquad.training.heads import LEVELS, WIDTH, WORDS, HeadTraining, frequent
from subquad.training.kangaroo import KangarooTraining
from subquad.training.prompt_tokens import PromptTokenTraining, entry_width
from subquad.training.s2d import SortedTraining, block_weights
from subquad.training.sequences import SequenceTraining

AHEAD = 3
"""Prompt tokens (PPD, §5)."""
APART = 1e-3
"""Spread of several copies of them at first, so that they can come to differ."""
EXIT = 2
"""Blocks in front of Kangaroo's adapter (paper, for 32 layers)."""
EXITS = (6 / 32, 9 / 32, 12 / 32)
"""S2D's exits as shares of the model's blocks (paper, for 32 layers)."""


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
    hidden, ids, _ = _sizes(material)
    blocks = _last_exit(material, min(EXIT, material.decoder.blocks - 1))
    part = Kangaroo(hidden, ids, torch.tensor([blocks]))
    return KangarooTraining(part.begin(material.head), material.decoder, material.text, seed)


def _s2d(material: Material, seed: int) -> DrafterTraining:
    hidden, ids, _ = _sizes(material)
    last = _last_exit(material, max(1, round(EXITS[-1] * material.decoder.blocks)))
    exits = sorted({round(last * exit / EXITS[-1]) for exit in EXITS} - {0})
    part = S2D(hidden, ids, torch.tensor(exits), block_weights(material.decoder, last))
    return SortedTraining(part.begin(material.head), material.decoder, material.text, seed)


def _last_exit(material: Material, most: int) -> int:
    """The blocks in front of the last exit; raises ConversionError where the decoder cannot run so many apart."""
    blocks = material.decoder.blocks if material.decoder.trees else 0
    found = material.loop.early_exit or most
    if not 0 < found < blocks:
        raise ConversionError(
            f"a {material.loop.method} drafter leaves the model behind block {found}, but its decoder has {blocks} that can be "
            "run apart; choose another early_exit or another method."
        )
    return found


RECIPES: dict[str, Recipe] = {
    **{name: _heads(name) for name in HEADS},
    "chimera": _chimera,
    "falcon": _falcon,
    "ppd": _ppd,
    "kangaroo": _kangaroo,
    "s2d": _s2d,
}
"""By the word for the drafter; its keys are those of speculate.TRAINED."""
