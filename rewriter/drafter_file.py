"""What was trained for drafters, beside an artifact's weights: drafters.safetensors, tensors named `<drafter>.<parameter>`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from subquad.ir.errors import ArtifactError
from subquad.ir.trained import NOTHING, Trained
from subquad.tensor_writing import write_tensors

NAME = "drafters.safetensors"


def write_drafters(trained: Trained, directory: Path) -> None:
    """Write the file; none where nothing was trained.  Its metadata says by drafter which model's head it belongs to."""
    tensors = {
        f"{drafter}.{name}": tensor.detach().cpu().contiguous()
        for drafter, parameters in trained.parameters.items()
        for name, tensor in parameters.items()
    }
    if tensors:
        write_tensors(tensors, directory / NAME, dict(trained.models))


def read_drafters(directory: Path) -> Trained:
    """What the file holds; nothing where there is none.  Raises ArtifactError when it is damaged."""
    path = directory / NAME
    if not path.is_file():
        return NOTHING
    from safetensors import SafetensorError, safe_open

    parameters: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt") as stored:
            models = dict(stored.metadata() or {})
            for full in stored.keys():  # noqa: SIM118
                drafter, _, name = full.partition(".")
                parameters.setdefault(drafter, {})[name] = stored.get_tensor(full)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); convert the model again.") from error
    if parameters.keys() - models.keys():
        raise ArtifactError(f"{path} does not say which model its drafters belong to; convert the model again.")
    return Trained(parameters, models)
