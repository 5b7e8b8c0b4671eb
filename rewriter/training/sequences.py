"""Train a drafter that reads a context, on whole texts with what the model foretold in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.passes.speculate.context_heads import REACH, ContextHeads
from subquad.training.checkpoint import optimiser_tensors, restore_optimiser
from subquad.training.foretold import Foretold
from subquad.training.heads import EPOCHS, HELD_OUT, RATE
from subquad.training.stages import cosine

ROWS = 4
"""Texts of a batch."""
COUNTED = 400
"""Places at most on which guesses are counted."""


@dataclass(frozen=True)
class Texts:
    """Texts beside each other, filled up behind their ends.

    ids: int64 [B, T].  hidden: [B, T, d] in fp32.  wanted: int64 [B, T], the drafter's number of the token that the model finds
    likeliest behind each place, -1 where it has none.  real: bool [B, T].  learnt: bool [B, T], places that are learnt from.
    """

    ids: Tensor
    hidden: Tensor
    wanted: Tensor
    real: Tensor
    learnt: Tensor

    def ahead(self, places: int) -> tuple[Tensor, Tensor]:
        """(wanted [B, T], bool [B, T]) so many places on: the numbers, and where there is one to learn."""
        width = self.ids.shape[1]
        moved = torch.full_like(self.wanted, -1)
        moved[:, : max(0, width - places)] = self.wanted[:, places:]
        real = torch.zeros_like(self.real)
        real[:, : max(0, width - places)] = self.real[:, places:]
        return moved, real & self.learnt & (moved >= 0)


Lesson = Callable[[Texts, float, torch.Generator], dict[str, Tensor]]
"""(texts, share of the training that is done, chance) → losses by name, of which "loss" is what is learnt."""


class SequenceTraining:
    """Batches of texts, in another order in every epoch."""

    def __init__(self, heads: ContextHeads, text: Foretold, lesson: Lesson, seed: int = 0) -> None:
        self.heads, self.text, self.lesson, self.seed = heads, text, lesson, seed
        found = [slice(max(s.start, s.stop - REACH), s.stop) for s in text.sequences() if s.stop - s.start > 2]
        held = max(1, int(len(found) * HELD_OUT)) if len(found) > 1 else 0
        self.training, self.held_out = found[: len(found) - held], found[len(found) - held :]
        source = torch.Generator().manual_seed(seed)
        self.order = [n for _ in range(EPOCHS) for n in torch.randperm(len(self.training), generator=source).tolist()]
        self.rows = max(1, min(ROWS, len(self.training)))
        self.batches = len(self.order) // self.rows
        self.size = EPOCHS * sum(s.stop - s.start for s in self.training) // max(1, self.batches)
        self.place = torch.full((heads.table.shape[0],), -1)
        self.place[heads.ids] = torch.arange(len(heads.ids))
        self.names = [name for name, _ in heads.named_parameters()]
        self.optimiser = torch.optim.AdamW(
            heads.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
        )

    @property
    def part(self) -> ContextHeads:
        """The heads."""
        return self.heads

    def work(self, number: int) -> dict[str, float]:
        """Train on batch `number`."""
        chosen = [self.training[n] for n in self.order[number * self.rows : (number + 1) * self.rows]]
        for group in self.optimiser.param_groups:
            group["lr"] = RATE * cosine(number, self.batches, 20, 0.02)
        with torch.enable_grad():
            chance = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            losses = self.lesson(self.texts(chosen), number / self.batches, chance)
            self.optimiser.zero_grad()
            losses["loss"].backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        self.optimiser.step()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def texts(self, chosen: list[slice]) -> Texts:
        """Some of the texts beside each other."""
        text, width = self.text, max(s.stop - s.start for s in chosen)

        def filled(values: Tensor, last: float) -> Tensor:
            out = values.new_full((len(chosen), width, *values.shape[1:]), last)
            for n, s in enumerate(chosen):
                out[n, : s.stop - s.start] = values[s]
            return out

        real = filled(torch.ones(len(text.ids), dtype=torch.bool), False)
        learnt = real & ~filled(text.asked, True)
        return Texts(
            filled(text.ids, 0), filled(text.hidden, 0).float(), filled(self.place[text.wanted], -1), real, learnt
        )

    @torch.no_grad()
    def guessed(self) -> list[float]:
        """For every level, the share of held-out tokens that its best guess hits, asked as in drafting."""
        hits, counts = ([0] * self.heads.levels for _ in range(2))
        for s in self.held_out:
            context, ids, hidden = self.heads.opened(), self.text.ids[s], self.text.hidden[s].float()
            for place in range(len(ids) - 1):
                context.add([int(ids[place])], hidden[place : place + 1])
                if self.text.asked[s][place] or counts[0] >= COUNTED:
                    continue
                guess = context.guesses(int(ids[place + 1]))
                if guess is None:
                    continue
                for level in range(min(self.heads.levels, len(ids) - 1 - place)):
                    scores = guess(level, ids[None, place + 2 : place + 2 + level])
                    counts[level] += 1
                    hits[level] += int(self.heads.ids[scores.argmax()]) == int(self.text.wanted[s][place + 1 + level])
        return [hit / max(1, count) for hit, count in zip(hits, counts, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state."""
        own = {f"heads/{name}": p for name, p in self.heads.named_parameters()}
        return own | optimiser_tensors(self.optimiser, self.names, "optimiser/")

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        with torch.no_grad():
            for name, parameter in self.heads.named_parameters():
                parameter.copy_(tensors[f"heads/{name}"])
        restore_optimiser(self.optimiser, self.names, "optimiser/", tensors)
