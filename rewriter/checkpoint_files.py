"""Is a directory in Hugging Face format whole?  Finds missing, torn and half-downloaded files before anything is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from subquad.ir.errors import ModelSourceError
from subquad.tokenization import read_json

_POINTER = b"version https://git-lfs.github.com/spec"


def check_directory(directory: Path) -> None:
    """Raise ModelSourceError, with one sentence, unless `directory` holds a config and complete weights."""
    if not (directory / "config.json").is_file():
        near = sorted(p.parent for p in directory.glob("*/config.json"))
        hint = f"; did you mean {near[0]}?" if near else "; give the directory that save_pretrained wrote."
        raise ModelSourceError(f"{directory} has no config.json, so it is not a model in Hugging Face format{hint}")
    read_json(directory / "config.json")
    partial = sorted(p.name for p in directory.iterdir() if p.suffix in (".incomplete", ".part", ".tmp", ".crdownload"))
    if partial:
        raise ModelSourceError(f"{directory} holds {partial[0]}, a download that has not finished; fetch it again.")
    files = _weight_files(directory)
    if not files:
        raise ModelSourceError(f"{directory} has a config.json but no weights (*.safetensors or pytorch_model.bin).")
    for path in files:
        if not path.is_file():
            raise ModelSourceError(
                f"{directory} lacks {path.name}, which its index names; fetch the missing files again."
            )
        check_weights(path)


def _weight_files(directory: Path) -> list[Path]:
    for pattern in ("*.safetensors", "*.bin"):
        for index in sorted(directory.glob(pattern + ".index.json")):
            names = read_json(index).get("weight_map", {}).values()
            return [directory / name for name in sorted(set(names))]
    whole = sorted(directory.glob("*.safetensors"))
    return whole or sorted(directory.glob("pytorch_model*.bin"))


def check_weights(path: Path) -> None:
    """Raise ModelSourceError unless a weights file is complete: not a pointer, not truncated, with a readable header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(_POINTER):
            raise ModelSourceError(
                f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull` there."
            )
        if size == 0:
            raise ModelSourceError(f"{path} is empty; fetch it again.")
        if path.suffix != ".safetensors":
            return
        if size < 8:
            raise ModelSourceError(f"{path} has only {size} bytes; fetch it again.")
        (length,) = struct.unpack("<Q", head[:8])
        if length > size - 8:
            raise ModelSourceError(f"{path} is cut off or not a safetensors file; fetch it again.")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelSourceError(
                f"{path} is not a safetensors file (its header cannot be read); fetch it again."
            ) from error
    if size != 8 + length + end:
        raise ModelSourceError(
            f"{path} is only half there: its header promises {8 + length + end} bytes and it has {size}; fetch it again."
        )
