"""A rewritten model as training sees it: hidden states with the original or the rewritten attention, and samples of sites."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad.application import Rewritten, rewritten
from subquad.emission import PARAMETERS
from subquad.ir.errors import ConversionError
from subquad.ir.rewrite import SiteOperator
from subquad.kernels.recurrence_training import recurrence_training, trains
from subquad.kernels.spec import RecurrenceSpec
from subquad.training.adapters import Adapters

Head = tuple[Tensor, Tensor | None]
Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Sample:
    """What one site read and gave in one batch: q [B, T, H, K], k, v [B, T, Hkv, K|V] and the original's output [B, T, H, V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    target: Tensor


@dataclass(frozen=True)
class TrainingSite:
    """One site that a rewrite gave parameters to: its path, its operator, and the parameters by operator argument."""

    path: str
    call: SiteOperator
    learned: dict[str, list[nn.Parameter]]
    form: Form

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, under the site's path."""
        names = {arg: self.call.parameters[arg] for arg in self.learned}
        return {
            f"{self.path}.{PARAMETERS}.{name}": value
            for arg, values in self.learned.items()
            for name, value in zip(names[arg], values, strict=True)
        }

    def predict(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The rewritten site's output [B, T, H, V] on whole, unpadded rows."""
        learned = self.learned

        def one(name: str) -> Tensor | None:
            return learned[name][0] if learned.get(name) else None

        feature_q, feature_k = learned.get("feature_q", []), learned.get("feature_k", [])
        spec = RecurrenceSpec.parse(self.call.spec)
        if trains(spec):
            return self.form(q, k, v, feature_q, feature_k, one("window_gate"), spec)
        out: Tensor = torch.ops.subquad.recurrence(
            q, k, v, one("decay"), one("beta"), feature_q, feature_k, one("window_gate"), *[None] * 6, self.call.spec
        )[0]
        return out


class TrainingModel(ABC):
    """A language model with switchable attention; `close` leaves the model as it was.

    model: the module.  sites: those with trainable parameters, in order.  head: the frozen output layer that turns
    `hidden` into logits, or None when `hidden` gives logits.
    """

    def __init__(self, model: nn.Module, sites: list[TrainingSite]) -> None:
        self.model, self.sites = model, sites
        self.head: Head | None = None
        self.adapters: Adapters | None = None

    @abstractmethod
    def hidden(self, ids: Tensor, original: bool = False) -> Tensor:
        """[B, T, D] before the output layer (logits when head is None) of ids int64 [B, T]; differentiable."""

    @abstractmethod
    def reference(self, ids: Tensor) -> Tensor:
        """What `hidden` gives for the original attention without adapters: the teacher, on the same weights."""

    def adapt(self, targets: list[str], rank: int, alpha: int, seed: int) -> Adapters:
        """Put adapters on the named linear layers; `hidden` runs through them from then on."""
        self.adapters = Adapters(self.model, targets, rank, alpha, seed)
        return self.adapters

    def merge(self) -> None:
        """Put the adapters into the weights; from then on every form computes with the merged weights."""
        if self.adapters is not None:
            self.adapters.merge()

    @abstractmethod
    def record(self, ids: Tensor) -> list[Sample]:
        """Run the original on ids and return what each site read and gave, in the order of `sites`; no gradients."""

    def close(self) -> None:
        """Take down what was put up for training."""
        return


def training_form(compile_it: bool) -> Form:
    """The differentiable full-sequence form, compiled for fixed sizes when asked."""
    if not compile_it:
        return recurrence_training
    compiled = torch.compile(recurrence_training, dynamic=False)

    def quiet(*arguments: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            return compiled(*arguments)

    return quiet


def training_sites(record: Rewritten, form: Form) -> list[TrainingSite]:
    """The sites of a rewritten model that have parameters.

    Raises ConversionError when there are none: then there is nothing to train.
    """
    found = []
    for replacement in record.replacements:
        if not replacement.call.parameters:
            continue
        holder: Any = record.original.root.get_submodule(replacement.prefix)
        learned = {arg: [getattr(holder, name) for name in names] for arg, names in replacement.call.parameters.items()}
        found.append(TrainingSite(replacement.prefix.rpartition(".")[0], replacement.call, learned, form))
    if not found:
        raise ConversionError(
            "no rewrite of this model added parameters, so there is nothing to train; apply linearize:lolcats first."
        )
    return found


def training_model(model: nn.Module, compile_it: bool) -> TrainingModel:
    """The training view of a rewritten model: through Hugging Face's registry where that serves it, else through its graph.

    Raises ConversionError when the model was not rewritten, or has no trainable site.
    """
    from subquad.training.graph_model import GraphModel
    from subquad.training.registry_model import RegistryModel, is_served

    record = rewritten(model)
    if record is None:
        raise ConversionError(f"{type(model).__name__} was not rewritten; apply an approximate pass, then convert.")
    sites = training_sites(record, training_form(compile_it))
    return RegistryModel(model, sites) if is_served(model, sites) else GraphModel(model, sites, record)
