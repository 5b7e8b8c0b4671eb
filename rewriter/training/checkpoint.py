"""An unfinished conversion on disk: tensors in safetensors, place and measurements in JSON, replaced atomically."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.ir.errors import ConversionError
from subquad.tensor_writing import write_tensors

FORMAT = 1
INDEX = "conversion.json"


@dataclass
class Progress:
    """Where a conversion stands: stage name, batches of it that are done, their last losses, and what was measured."""

    stage: str = "start"
    batch: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def unfinished(target: Path, part: str | None = None) -> Path:
    """Where the state of a conversion to `target` is kept until its end, or of a part of it."""
    return target.with_name(".".join([target.name, *([part] if part else []), "unfinished"]))


class Checkpoint:
    """A directory beside the output; it holds one whole state at any moment, whenever the process dies.

    A new tensor file is written and flushed under its own name first; replacing the index makes it the state.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        self.directory, self.digest = directory, digest

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The stored state, None when there is none.

        Raises ConversionError for a state of another conversion, or one that is torn.
        """
        index = self.directory / INDEX
        if not index.is_file():
            return None
        from safetensors.torch import load_file

        try:
            data = json.loads(index.read_text(encoding="utf-8"))
            same = data["format"] == FORMAT and data["digest"] == self.digest
            progress = Progress(**data["progress"])
            tensors = load_file(str(self.directory / data["tensors"])) if same else {}
        except Exception as error:
            raise ConversionError(f"{self.directory} cannot be read ({error}); remove it to start again.") from error
        if not same:
            raise ConversionError(
                f"{self.directory} is the unfinished conversion of another model, text or setting; "
                "run that one to its end, remove the directory, or choose another output."
            )
        return progress, tensors

    def store(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Make this the stored state; raises ConversionError when the disk is full, and the state before stays."""
        name = f"{progress.stage}-{progress.batch}.safetensors"
        fresh = self.directory / (name + ".new")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_tensors({key: value.detach().contiguous().clone() for key, value in tensors.items()}, fresh)
            _flush(fresh)
            os.replace(fresh, self.directory / name)
            index = self.directory / (INDEX + ".new")
            data = {"format": FORMAT, "digest": self.digest, "tensors": name, "progress": vars(progress)}
            index.write_text(json.dumps(data, indent=1), encoding="utf-8")
            _flush(index)
            os.replace(index, self.directory / INDEX)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise ConversionError(
                f"the state of the conversion could not be written to {self.directory} ({error.strerror or error}); "
                "the one before is still there."
            ) from error
        for old in self.directory.glob("*.safetensors*"):
            if old.name != name:
                old.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: list[str], prefix: str) -> dict[str, Tensor]:
    """An optimiser's state as named tensors; `names` are those of its parameters in order."""
    state = optimiser.state_dict()["state"]
    return {
        f"{prefix}{names[index]}/{key}": torch.as_tensor(value)
        for index, slots in state.items()
        for key, value in slots.items()
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, names: list[str], prefix: str, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimiser_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name, _, slot = key.removeprefix(prefix).rpartition("/")
            if name in names:
                state.setdefault(names.index(name), {})[slot] = value
    whole = optimiser.state_dict()
    whole["state"] = state
    optimiser.load_state_dict(whole)
