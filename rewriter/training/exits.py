"""Train what leaves a model early on what the model foretold: whole sequences, every exit on the model's own law."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from subquad.passes.speculate.exit_words import ExitWords
from subquad.training.checkpoint import optimiser_tensors, restore_optimiser
from subquad.training.foretold import Foretold
from subquad.training.losses import mixed_loss
from subquad.training.stages import cosine

EPOCHS = 4
TOKENS = 2048
"""Of a batch, padding included."""
WINDOW = 64
"""Sequences of like lengths are sought among this many neighbours of the shuffled text."""
FITTED = 2
"""Batches to which the norm is fitted at first."""
HELD_OUT = 0.04
"""Share of the sequences, at the end of the text, on which guesses are counted."""


class ExitTraining(ABC):
    """Batches of sequences.  The loss is the mean over the exits (sorted fine-tuning, 2309.08968) of the KL divergence from the
    model's law among the tokens that are drafted (Kangaroo, eq. 3, up to a constant); what was asked is context only.
    """

    def __init__(self, part: ExitWords, text: Foretold, rate: float, seed: int = 0) -> None:
        """rate: the learning rate at its highest."""
        self.part, self.text, self.rate = part, text, rate
        whole = [one for one in text.sequences() if bool((~text.asked[one]).any())]
        held = min(len(whole) - 1, max(1, int(len(whole) * HELD_OUT)))
        self.held_out = whole[len(whole) - held :] if held > 0 else []
        training = whole[: len(whole) - held] if held > 0 else whole
        source = torch.Generator().manual_seed(seed)
        self.order = [
            batch
            for _ in range(EPOCHS)
            for batch in _batches([training[n] for n in torch.randperm(len(training), generator=source).tolist()])
        ]
        self.batches, self.size = len(self.order), TOKENS
        self.place = torch.full((int(max(text.wanted.max(), part.ids.max())) + 1,), -1)
        self.place[part.ids] = torch.arange(len(part.ids))
        self.named = self.parameters()
        self.optimiser = torch.optim.AdamW(
            self.named.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
        )
        self._fit()

    @torch.no_grad()
    def _fit(self) -> None:
        """The norm's first values, from the first batches; all exits share it."""
        found: list[tuple[Tensor, Tensor]] = []
        for sequences in self.order[:FITTED]:
            found += [(stream, original) for stream, _, original in self._exits(sequences)]
        if found:
            self.part.fit(*(torch.cat(side) for side in zip(*found, strict=True)))

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """What learns, by name."""

    @abstractmethod
    def streams(self, sequences: Sequence[slice]) -> list[Tensor]:
        """For every exit the stream fp32 [B, T, d] that its norm reads; rows are filled up behind their sequences."""

    def work(self, number: int) -> dict[str, float]:
        """Train on batch `number`."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * cosine(number, self.batches, 20, 0.02)
        loss, found = torch.zeros(()), {}
        with torch.enable_grad():
            for number_of, (stream, wanted, original) in enumerate(self._exits(self.order[number])):
                ours = self.part.normed(stream)
                one, means = mixed_loss(ours, original, (self.part.rows, None), wanted.clamp_min(0), 0.0, 1.0)
                loss = loss + one / len(self.part.exits)
                found[f"kl {int(self.part.exits[number_of])}"] = float(means[1])
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimiser.step()
        return found

    def _exits(self, sequences: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For every exit (its stream [n, d], place of the wanted token among the drafted ones or -1 [n], the model's [n, d])."""
        learnt = [(~self.text.asked[one]).nonzero().flatten() for one in sequences]
        wanted = torch.cat(
            [self.place[self.text.wanted[one]][places] for one, places in zip(sequences, learnt, strict=True)]
        )
        original = torch.cat(
            [self.text.hidden[one][places] for one, places in zip(sequences, learnt, strict=True)]
        ).float()
        for stream in self.streams(sequences):
            rows = torch.cat([row[places] for row, places in zip(stream, learnt, strict=True)])
            yield rows, wanted, original

    @torch.no_grad()
    def guessed(self) -> list[float]:
        """For every exit, the share of held-out tokens that its best guess hits, unknown tokens counted as misses."""
        hits, count = [0] * len(self.part.exits), 0
        for sequences in _batches(self.held_out):
            for number, (stream, wanted, _) in enumerate(self._exits(sequences)):
                hits[number] += int(((self.part.normed(stream) @ self.part.rows.T).argmax(-1) == wanted).sum())
            count += len(wanted)
        return [hit / max(1, count) for hit in hits]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state."""
        own = {f"part/{name}": p for name, p in self.named.items()}
        return own | optimiser_tensors(self.optimiser, list(self.named), "optimiser/")

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"part/{name}"])
        restore_optimiser(self.optimiser, list(self.named), "optimiser/", tensors)


def _batches(sequences: Sequence[slice]) -> Iterator[list[slice]]:
    """Sequences of like lengths together, as many as fit."""
    for first in range(0, len(sequences), WINDOW):
        batch: list[slice] = []
        for one in sorted(sequences[first : first + WINDOW], key=_length):
            if batch and (len(batch) + 1) * _length(one) > TOKENS:
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch


def _length(one: slice) -> int:
    return int(one.stop - one.start)
