"""The zoo: tiny random instances of every Hugging Face architecture that a generic shrink of its config can build."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo_config import VARIANTS, small_config
from zoo_inputs import inputs_of

logging.getLogger("transformers").setLevel(logging.CRITICAL)
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}
"""The four kinds of models with a head, and the bare models of the architectures that have none of them."""
LARGEST = 30_000_000
LABELS = 64
"""Classes of image models: the two or three rows of two that they have by default are too few numbers to estimate an error."""


@dataclass(frozen=True)
class Architecture:
    """One entry of the zoo: a model class of one architecture, as `kind:model_type`."""

    kind: str
    model_type: str
    model_class: str

    @property
    def name(self) -> str:
        """The name that selects this entry."""
        return f"{self.kind}:{self.model_type}"


@dataclass(frozen=True)
class Specimen:
    """A built model with what it was built from; `spelling` is the attention implementation that it really has."""

    architecture: Architecture
    model: nn.Module
    spelling: str


class NotBuilt(Exception):
    """No generic shrink of the architecture's config gives a model that runs here; the message says why."""


class NotRewritten(Exception):
    """The original forward ran in place of the rewritten one."""


def architectures(*kinds: str) -> list[Architecture]:
    """Every entry of the mappings of the given kinds (all but "base" by default), each model class once."""
    found: dict[str, Architecture] = {}
    headed = {model_type for kind in list(KINDS)[:4] for model_type in getattr(modeling_auto, KINDS[kind])}
    for kind in kinds or tuple(KINDS)[:4]:
        for model_type, classes in getattr(modeling_auto, KINDS[kind]).items():
            if kind == "base" and model_type in headed:
                continue
            name = classes if isinstance(classes, str) else classes[0]
            entry = Architecture(kind, model_type, name)
            found.setdefault(entry.name, entry)
    return list(found.values())


def architecture(name: str) -> Architecture:
    """The entry with the given `kind:model_type`."""
    return next(a for a in architectures(*KINDS) if a.name == name)


def build(entry: Architecture, spelling: str) -> Specimen:
    """A seeded fp32 instance in eval mode, whose forward has run on its example inputs.

    spelling: "eager" or "sdpa"; a model without that one gets its own default.  Raises NotBuilt.
    """
    reasons: list[str] = []
    for config in _configs(entry, reasons):
        try:
            specimen = _instance(entry, config, spelling)
            with torch.no_grad():
                call(specimen.model, inputs_of(specimen.model, entry.kind))
            return specimen
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}")
    raise NotBuilt(reasons[0] if reasons else "no configuration")


def call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The model's output; warnings of the model are not ours, but a rewritten forward that was not used is an error."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        output = model(**inputs)
    unused = [str(w.message) for w in heard if "subquad ran the original forward" in str(w.message)]
    if unused:
        raise NotRewritten(unused[0])
    return output


def _configs(entry: Architecture, reasons: list[str]) -> Iterator[Any]:
    for kept in VARIANTS:
        try:
            config = small_config(CONFIG_MAPPING[entry.model_type], kept)
        except Exception as error:
            lines = str(error).strip().splitlines()
            reasons.append(f"{type(error).__name__}: {lines[-1].strip()[:160] if lines else ''}")
            continue
        if entry.kind == "image":
            config.num_labels = LABELS
        yield _as_decoder(config) if entry.kind == "causal" else config
        text = config.get_text_config(decoder=True)
        if text is not config:
            yield text


def _as_decoder(config: Any) -> Any:
    """Encoders that have a causal head ask for this switch."""
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def _instance(entry: Architecture, config: Any, spelling: str) -> Specimen:
    kind = getattr(transformers, entry.model_class)
    for chosen in (spelling, "eager", None):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in kind._from_config(config, attn_implementation=chosen).parameters())
            if size > LARGEST:
                raise NotBuilt(f"{size / 1e6:.0f} million parameters at its smallest")
        except (ValueError, ImportError) as error:
            if "attn_implementation" in str(error) or "does not support" in str(error):
                continue
            raise
        torch.manual_seed(0)
        model = kind._from_config(config, attn_implementation=chosen, dtype=torch.float32).eval()
        return Specimen(entry, scatter(model), str(model.config._attn_implementation))
    raise NotBuilt("no attention implementation is accepted")


def scatter(model: nn.Module) -> nn.Module:
    """Random values in every weight: initialisers leave zeros and ones, which hide what a rewrite gets wrong."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.1 if parameter.dim() < 2 else min(0.3, 1.5 / max(1, parameter[0].numel()) ** 0.5)
            parameter.add_(noise * spread)
    return model
