"""Example inputs for a model of any kind, by the names of its forward's arguments, at two sizes and three paddings."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from zoo_config import FIRST_SPECIAL

SIZES = ((2, 9), (3, 14))
"""Batch and number of tokens."""
PADDINGS = ("none", "left", "right")


def inputs_of(model: nn.Module, kind: str, size: int = 0, padding: str = "none") -> dict[str, Any]:
    """Keyword arguments for the model's forward.

    size: index into SIZES; the resolution of images is fixed by their model, so only their batch changes.  padding: which
    end of the text is padding; a model without text takes "none" only.
    """
    names = inspect.signature(type(model).forward).parameters
    batch, length = SIZES[size]
    generator = torch.Generator().manual_seed(size + 1)
    made: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    takes_text = "input_ids" in names and (main == "input_ids" or kind in ("causal", "masked", "seq2seq"))
    if takes_text and main not in ("input_features", "input_values"):
        made["input_ids"] = _ids(batch, length, generator)
        if "attention_mask" in names:
            made["attention_mask"] = padding_mask(batch, length, padding)
    if main != "input_ids" and main in names:
        made[main] = _signal(model, main, batch, length, generator)
        if main == "input_features" and "attention_mask" in names and kind == "seq2seq":
            made["attention_mask"] = None
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = _ids(batch, length - 3, generator)
    if "use_cache" in names:
        made["use_cache"] = False
    return {name: value for name, value in made.items() if value is not None and _accepts(names, name)}


def takes_padding(inputs: dict[str, Any]) -> bool:
    """True for inputs with a padding mask."""
    return "attention_mask" in inputs


def padding_mask(batch: int, length: int, padding: str) -> torch.Tensor:
    """Int64 [batch, length], another number of zeros in every row, none in the first."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch) if padding != "none" else ():
        hidden = slice(0, 2 * row) if padding == "left" else slice(length - 2 * row, length)
        mask[row, hidden] = 0
    return mask


def _accepts(names: Any, name: str) -> bool:
    return name in names or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())


def _ids(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(5, FIRST_SPECIAL, (batch, length), generator=generator)


def _signal(model: nn.Module, name: str, batch: int, length: int, generator: torch.Generator) -> Any:
    config = model.config
    if name == "pixel_values":
        height, width = _resolution(config)
        channels = _first(config, ("num_channels", "image_channels", "in_channels", "in_chans"), 3)
        return torch.randn(batch, channels, height, width, generator=generator)
    if name == "pixel_values_videos":
        height, width = _resolution(config)
        frames = _first(config, ("num_frames", "frames_per_clip"), 4)
        return torch.randn(batch, frames, 3, height, width, generator=generator)
    if name == "input_features":
        bins = _first(config, ("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels"), 80)
        frames = 2 * _first(config, ("max_source_positions",), 32)
        if getattr(config, "max_source_positions", None) is not None and "whisper" in type(model).__name__.lower():
            return torch.randn(batch, bins, frames, generator=generator)
        return torch.randn(batch, frames, bins, generator=generator)
    if name == "input_values":
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
            return torch.randn(batch, config.max_length, config.num_mel_bins, generator=generator)
        return torch.randn(batch, 4000 + 640 * length, generator=generator)
    if name == "inputs_embeds":
        return torch.randn(batch, length, config.hidden_size, generator=generator)
    return None


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    for inner in ("vision_config", "audio_config", "encoder", "encoder_config"):
        if getattr(config, inner, None) is not None and not isinstance(getattr(config, inner), dict):
            return _first(getattr(config, inner), names, default)
    return default


def _resolution(config: Any) -> tuple[int, int]:
    for holder in (config, getattr(config, "vision_config", None), getattr(config, "encoder", None)):
        size = getattr(holder, "image_size", None) or getattr(holder, "input_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) >= 2:
            return int(size[-2]), int(size[-1])
    return 64, 64
