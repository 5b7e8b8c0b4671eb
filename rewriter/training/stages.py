"""The two stages of a conversion as batch-by-batch work: attention transfer, and adapters with the added parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from subquad.training.checkpoint import optimiser_tensors, restore_optimiser
from subquad.training.losses import mixed_loss, transfer_loss
from subquad.training.settings import Settings
from subquad.training.sites import Sample, TrainingModel

BETAS = (0.9, 0.95)
CLIP = 1.0


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine from 1 to `floor`."""
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


class AttentionTransfer:
    """Stage 1: each rewritten site learns the original's output on the original's q, k and v (LoLCATs §3.1).

    One forward of the original serves all sites; every batch is then used for several optimiser steps, which need the
    sites' own small parameters only.
    """

    def __init__(self, model: TrainingModel, settings: Settings, tokens: Tensor) -> None:
        self.model, self.settings, self.tokens = model, settings, tokens
        self.steps = settings.transfer_batches * settings.transfer_updates
        self.names = [list(site.parameters) for site in model.sites]
        self.optimisers = [
            torch.optim.Adam(site.parameters.values(), lr=settings.transfer_rate, betas=BETAS, foreach=True)
            for site in model.sites
        ]

    def work(self, number: int) -> dict[str, float]:
        """Train on batch `number`; returns the mean relative error of all sites before its last update."""
        size = self.settings.transfer_rows * self.settings.length
        ids = self.tokens[number * size : (number + 1) * size].view(-1, self.settings.length)
        samples = self.model.record(ids)
        errors = [self._train(index, number, sample) for index, sample in enumerate(samples)]
        return {"error": sum(errors) / len(errors)}

    def _train(self, index: int, number: int, sample: Sample) -> float:
        site, optimiser = self.model.sites[index], self.optimisers[index]
        loss = torch.zeros(())
        for update in range(self.settings.transfer_updates):
            step = number * self.settings.transfer_updates + update
            _set_rates(optimiser, [self.settings.transfer_rate], cosine(step, self.steps, 5, 0.0))
            with torch.enable_grad():
                loss = transfer_loss(site.predict(sample.q, sample.k, sample.v), sample.target)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return float(loss.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state."""
        found = {name: p for site in self.model.sites for name, p in site.parameters.items()}
        result: dict[str, Tensor] = {f"added/{name}": p for name, p in found.items()}
        for names, optimiser in zip(self.names, self.optimisers, strict=True):
            result |= optimiser_tensors(optimiser, names, "transfer/")
        return result

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        put_back(self.model, tensors)
        for names, optimiser in zip(self.names, self.optimisers, strict=True):
            restore_optimiser(optimiser, names, "transfer/", tensors)


class AdapterTraining:
    """Stage 2: adapters and the added parameters learn end to end, on the next token and the original's distribution.

    The teacher is the same module with the original attention and the adapters off, so there is no second copy.
    """

    def __init__(self, model: TrainingModel, settings: Settings, tokens: Tensor) -> None:
        self.model, self.settings = model, settings
        self.tokens = tokens[settings.transfer_batches * settings.transfer_rows * settings.length :]
        added = {name: p for site in model.sites for name, p in site.parameters.items()}
        low_rank = model.adapters.parameters if model.adapters is not None else {}
        self.named = {f"adapter/{name}": p for name, p in low_rank.items()}
        self.named |= {f"added/{name}": p for name, p in added.items()}
        self.rates = [settings.adapter_rate, settings.added_rate]
        groups: list[dict[str, Any]] = [{"params": list(low_rank.values())}]
        if added:
            groups.append({"params": list(added.values())})
        self.optimiser = torch.optim.AdamW(groups, lr=self.rates[0], betas=BETAS, weight_decay=0.0, foreach=True)

    def work(self, number: int) -> dict[str, float]:
        """Train on batch `number`; returns its cross-entropy and KL."""
        size = self.settings.rows * self.settings.length
        ids = self.tokens[number * size : (number + 1) * size].view(-1, self.settings.length)
        reference: Tensor | None = None
        if self.settings.distillation > 0:
            reference = self.model.reference(ids)[:, :-1].flatten(0, 1)
        with torch.enable_grad():
            states = self.model.hidden(ids)[:, :-1].flatten(0, 1)
            loss, means = mixed_loss(
                states, reference, self.model.head, ids[:, 1:].flatten(),
                self.settings.cross_entropy, self.settings.distillation,
            )  # fmt: skip
        _set_rates(self.optimiser, self.rates, cosine(number, self.settings.adapter_batches, 10, 0.05))
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.named.values(), CLIP)
        self.optimiser.step()
        return {"loss": float(loss.detach()), "ce": float(means[0]), "kl": float(means[1])}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state."""
        return dict(self.named) | optimiser_tensors(self.optimiser, list(self.named), "adam/")

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        put_back(self.model, tensors)
        with torch.no_grad():
            for name, parameter in self.named.items():
                if name in tensors:
                    parameter.copy_(tensors[name])
        restore_optimiser(self.optimiser, list(self.named), "adam/", tensors)


def put_back(model: TrainingModel, tensors: dict[str, Tensor]) -> None:
    """Copy stored values of the added parameters into the model."""
    with torch.no_grad():
        for site in model.sites:
            for name, parameter in site.parameters.items():
                if f"added/{name}" in tensors:
                    parameter.copy_(tensors[f"added/{name}"])


def _set_rates(optimiser: torch.optim.Optimizer, rates: Iterable[float], factor: float) -> None:
    for group, rate in zip(optimiser.param_groups, rates, strict=False):
        group["lr"] = rate * factor
