"""Write a model and its tokenizer as a directory in Hugging Face format, without half-written states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from subquad.tensor_writing import write_tensors
from subquad.tokenization import TextCodec


def write_weights(model: torch.nn.Module, path: Path) -> set[str]:
    """Write every parameter and persistent buffer to one safetensors file; returns the names written.

    Tied tensors are written once, under their first name.
    """
    state = untied_state(model)
    write_tensors(state, path, {"format": "pt"})
    return set(state)


def untied_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without repetitions: of tensors that are the same memory, only the first name is kept.

    Tensors whose memory overlaps another's in part are copied, since safetensors stores no overlap; disjoint views of one
    storage are not.
    """
    kept: dict[str, torch.Tensor] = {}
    spans: dict[int, list[tuple[int, int, torch.Tensor]]] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().to("cpu")
        first = value.storage_offset() * value.element_size()
        last = first + value.numel() * value.element_size()
        known = spans.setdefault(value.untyped_storage().data_ptr(), [])
        shape = (first, last, value.shape, value.stride())
        if value.numel() and any((a, b, t.shape, t.stride()) == shape for a, b, t in known):
            continue
        overlaps = not value.is_contiguous() or any(first < b and a < last for a, b, _ in known)
        known.append((first, last, value))
        kept[name] = value.clone(memory_format=torch.contiguous_format) if overlaps else value
    return kept


def write_codec(codec: TextCodec, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja so that transformers and ours both read them."""
    codec.tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **codec.special,
    }
    if codec.chat_template is not None:
        settings["chat_template"] = codec.chat_template
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8"
    )


def write_config(model: Any, directory: Path) -> None:
    """Write config.json and, when the model generates, generation_config.json."""
    model.config.to_json_file(str(directory / "config.json"))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(str(directory / "generation_config.json"))
