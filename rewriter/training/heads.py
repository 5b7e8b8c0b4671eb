"""Train a drafter's heads on what the model foretold: cross-entropy of every level, from hidden states that were kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.passes.speculate.draft_heads import DraftHeads
from subquad.training.checkpoint import optimiser_tensors, restore_optimiser
from subquad.training.foretold import Foretold
from subquad.training.stages import cosine

WORDS = 8192
"""Most tokens that are drafted: those that are most frequent in the text."""
WIDTH = 256
"""Numbers that a level turns into scores."""
LEVELS = 4
EPOCHS = 4
BATCH = 512
RATE = 2e-3
DECAY = 0.8
"""Weight of a level's loss relative to the one before it (Medusa, §2.2.1)."""
HELD_OUT = 0.04
"""Share of the text, at its end, on which guesses are counted."""


def frequent(ids: Tensor, most: int) -> Tensor:
    """The most frequent ids int64, at most `most`, ascending."""
    found, counts = ids.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most]
    return found[order].sort().values


class HeadTraining:
    """Batches of places in a text; each place trains every level that has a token to guess there.

    The loss is the cross-entropy against the token that the model finds likeliest: what greedy verification compares with.
    Tokens outside the heads' vocabulary are left out of it.
    """

    def __init__(self, heads: DraftHeads, text: Foretold, seed: int = 0) -> None:
        self.heads, self.text = heads, text
        usable = ((text.left >= 1) & ~text.asked).nonzero().flatten()
        held = int(len(usable) * HELD_OUT)
        order = torch.Generator().manual_seed(seed)
        self.training, self.held_out = usable[: len(usable) - held], usable[len(usable) - held :]
        self.order = torch.cat(
            [self.training[torch.randperm(len(self.training), generator=order)] for _ in range(EPOCHS)]
        )
        self.size = min(BATCH, max(1, len(self.training)))
        self.batches = len(self.order) // self.size
        self.place = torch.full((heads.table.shape[0],), -1)
        self.place[heads.ids] = torch.arange(len(heads.ids))
        self.names = [name for name, _ in heads.named_parameters()]
        self.optimiser = torch.optim.AdamW(
            heads.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
        )

    @property
    def part(self) -> DraftHeads:
        """The heads."""
        return self.heads

    def work(self, number: int) -> dict[str, float]:
        """Train on batch `number`."""
        places = self.order[number * self.size : (number + 1) * self.size]
        for group in self.optimiser.param_groups:
            group["lr"] = RATE * cosine(number, self.batches, 20, 0.02)
        loss = torch.zeros(())
        with torch.enable_grad():
            for level in range(self.heads.levels):
                scores, wanted = self._level(level, places)
                if len(wanted):
                    loss = loss + DECAY**level * F.cross_entropy(scores, wanted)
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        self.optimiser.step()
        return {"loss": float(loss.detach())}

    def _level(self, level: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [n, R] of the places that have a known token to guess, and its place among the heads' tokens."""
        places = places[self.text.left[places] >= level + 1]
        wanted = self.place[self.text.wanted[places + level + 1]]
        places, wanted = places[wanted >= 0], wanted[wanted >= 0]
        tokens = self.text.ids[places[:, None] + torch.arange(1, level + 2)]
        return self.heads.scores(level, self.text.hidden[places].float(), tokens), wanted

    @torch.no_grad()
    def guessed(self) -> list[float]:
        """For every level, the share of held-out tokens that its best guess hits, unknown tokens counted as misses."""
        found = []
        for level in range(self.heads.levels):
            hits, count = 0, 0
            for places in self.held_out.split(4 * BATCH):
                scores, wanted = self._level(level, places)
                hits += int((scores.argmax(-1) == wanted).sum())
                count += int((self.text.left[places] >= level + 1).sum())
            found.append(hits / max(1, count))
        return found

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
