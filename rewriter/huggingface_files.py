"""Write a model and its tokenizer as a directory in Hugging Face format, without half-written states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from subquad.tokenization import TextCodec


def write_weights(model: torch.nn.Module, path: Path) -> None:
    """Write every parameter and persistent buffer to one safetensors file, tied tensors once, under their first name."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(untied_state(model), str(path), metadata={"format": "pt"})
    path.chmod(mode)


def untied_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without repetitions: of tensors that are the same object, only the first name is kept.

    Tensors that share storage in part (views of one packed weight) are copied, since safetensors stores no overlap.
    """
    kept: dict[str, torch.Tensor] = {}
    same: set[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = set()
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and identity in same:
            continue
        same.add(identity)
        overlaps = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        value = tensor.detach().to("cpu")
        kept[name] = value.clone() if overlaps else value.contiguous()
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
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")


def write_config(model: Any, directory: Path) -> None:
    """Write config.json and, when the model generates, generation_config.json."""
    model.config.to_json_file(str(directory / "config.json"))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(str(directory / "generation_config.json"))
