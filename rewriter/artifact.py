"""A rewritten model on disk: weights, plan and manifest in a directory that is whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.application import rewritten
from subquad.artifact_directory import FORMAT, MANIFEST, PLAN, WEIGHTS, read_manifest
from subquad.checkpoint_files import check_weights
from subquad.decoder_writing import write_decoder
from subquad.drafter_file import read_drafters, write_drafters
from subquad.emission import PARAMETERS
from subquad.environment import versions
from subquad.fingerprint import fingerprint
from subquad.huggingface_files import write_codec, write_config, write_weights
from subquad.ir.errors import ArtifactError, PlanError
from subquad.model_source import LoadedModel, open_model, remember_source, source_note
from subquad.pipeline import rewrite
from subquad.plan_file import read_plan
from subquad.private_cache import written_beside
from subquad.tensor_writing import write_tensors
from subquad.tokenization import FILES, read_codec

EXAMPLE = "example_inputs.safetensors"


def save(model: nn.Module, out: str | Path, overwrite: bool = False) -> Path:
    """Save a rewritten model; returns the path.

    model: what `rewrite`, `convert` or `load` returned.  out: a directory to make, or a name ending in .pt2 for an exported
    program.  overwrite: replace an existing artifact, which stays whole until the new one stands.
    The directory holds model.safetensors (the model's own names, plus what rewrites added), plan.json, subquad.json, what
    was trained for drafters, if anything, in drafters.safetensors and, for a Hugging Face model, its config and tokenizer.
    Raises ArtifactError when the model was not rewritten, `out` exists, or the disk is full.
    """
    target = Path(out)
    record = rewritten(model)
    if record is None:
        raise ArtifactError(f"{type(model).__name__} was not rewritten, so there is nothing to save.")
    check_output(target, overwrite)
    try:
        if target.suffix == ".pt2":
            from subquad.program_export import export_program

            return export_program(record, target)
        with written_beside(target) as fresh:
            _write(model, fresh)
    except OSError as error:
        raise ArtifactError(
            f"{target} could not be written ({error.strerror or error}); what was there before is untouched."
        ) from error
    return target


def check_output(target: Path, overwrite: bool) -> None:
    """Raise ArtifactError when `target` may not be written: it exists, or it is something that subquad did not make."""
    if target.suffix == ".pt2" or not target.is_dir():
        if target.exists() and not overwrite:
            raise ArtifactError(f"{target} exists; give --overwrite (overwrite=True) to replace it.")
        if target.exists() and target.suffix != ".pt2":
            raise ArtifactError(f"{target} is a file; give the name of a directory to write.")
    elif any(target.iterdir()):
        if not (target / MANIFEST).is_file():
            raise ArtifactError(f"{target} holds files that subquad did not write; give another directory.")
        if not overwrite:
            raise ArtifactError(f"{target} exists; give --overwrite (overwrite=True) to replace it.")


def _write(model: Any, directory: Path) -> None:
    record = rewritten(model)
    assert record is not None
    source = source_note(model)
    stored = write_weights(model, directory / WEIGHTS)
    (directory / PLAN).write_text(record.plan.to_json(), encoding="utf-8")
    write_drafters(record.trained, directory)
    huggingface = hasattr(model, "config") and hasattr(model.config, "to_json_file")
    if huggingface:
        write_config(model, directory)
        _write_tokenizer(source, model, directory)
        if not hasattr(model, "can_generate") or model.can_generate():
            why = write_decoder(record, model, directory, stored)
            if why is not None:
                record.report.notes.append(f"no decoder was stored: {why}")
    else:
        example = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in record.original.example.items()}
        write_tensors(example, directory / EXAMPLE)
    manifest = {
        "format": FORMAT,
        "plan_hash": record.plan.hash,
        "model": fingerprint(model),
        "class": f"{type(model).__module__}:{type(model).__qualname__}",
        "source": {
            "kind": "huggingface" if huggingface else source.kind if source is not None else "module",
            "origin": source.origin if source is not None else "",
        },
        "versions": versions(),
        "report": record.report.json(),
    }
    (directory / MANIFEST).write_text(json.dumps(_plain(manifest), indent=1), encoding="utf-8")


def _write_tokenizer(source: LoadedModel | None, model: Any, directory: Path) -> None:
    """Copy tokenizer files from where the model came from, or write them from the codec in memory."""
    places = [source.origin if source is not None else "", str(getattr(model.config, "_name_or_path", "") or "")]
    for place in places:
        if place and (Path(place) / "tokenizer.json").is_file():
            for name in FILES:
                if (Path(place) / name).is_file() and not (directory / name).exists():
                    shutil.copyfile(Path(place) / name, directory / name)
            return
    if source is not None and source.codec is not None:
        write_codec(source.codec, directory)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def load(
    out: str | Path, *, model: nn.Module | None = None, trust: bool = False, dtype: str = "auto", verify: bool = False
) -> nn.Module:
    """Load what `save` wrote; returns the rewritten module with its `report`.

    out: the directory.  model: for a plain module that no factory file rebuilds, an instance of the same class, whose
    weights are replaced.  trust: required when the model is built by a file.py:factory.  dtype: as for open_model.
    verify: run the verification ladder again.
    Raises ArtifactError for a directory that is not whole, PlanError when the plan was made for another model.
    """
    directory = Path(out)
    manifest = read_manifest(directory)
    plan = read_plan(directory / PLAN)
    if plan.hash != manifest["plan_hash"]:
        raise ArtifactError(
            f"{directory / PLAN} was changed after it was saved (hash {plan.hash}, not {manifest['plan_hash']})."
        )
    if not (directory / WEIGHTS).is_file():
        raise ArtifactError(f"{directory} lacks {WEIGHTS}; save the model again.")
    check_weights(directory / WEIGHTS)
    source = _skeleton(directory, manifest, model, trust, dtype)
    fast = rewrite(source.module, plan=plan, example_inputs=source.example_inputs, verify=verify)
    _fill(fast, directory, own=manifest["source"]["kind"] != "huggingface")
    if (record := rewritten(fast)) is not None:
        record.trained = read_drafters(directory)
    source.module = fast
    remember_source(source)
    return fast


def _skeleton(
    directory: Path, manifest: dict[str, Any], model: nn.Module | None, trust: bool, dtype: str
) -> LoadedModel:
    kind, origin = manifest["source"]["kind"], str(manifest["source"].get("origin", ""))
    if model is not None:
        return LoadedModel(model.eval(), _example(directory), read_codec(directory), kind, origin)
    if kind == "huggingface":
        opened = open_model(str(directory), trust=trust, dtype=dtype, plain=True)
        return LoadedModel(opened.module, None, opened.codec, kind, str(directory))
    if kind == "factory":
        return open_model(origin, trust=trust, dtype=dtype)
    raise ArtifactError(
        f"{directory} holds weights of {manifest.get('class', 'a module')}, which subquad cannot build; "
        "give an instance: subquad.load(out, model=...)."
    )


def _example(directory: Path) -> dict[str, torch.Tensor] | None:
    if not (directory / EXAMPLE).is_file():
        return None
    from safetensors.torch import load_file

    return load_file(str(directory / EXAMPLE))


def _fill(fast: nn.Module, directory: Path, own: bool) -> None:
    """Put the stored values into the parameters that rewrites added and, when `own`, into the model's own as well."""
    from safetensors import safe_open

    wanted = dict(fast.state_dict(keep_vars=True))
    with safe_open(str(directory / WEIGHTS), framework="pt") as stored, torch.no_grad():
        names = set(stored.keys())
        for name, tensor in wanted.items():
            added = PARAMETERS in name.split(".")
            if not (added or own):
                continue
            if name not in names:
                if not added and any(tensor is wanted[other] for other in names & set(wanted)):
                    continue
                raise ArtifactError(
                    f"{directory / WEIGHTS} lacks {name}, which the plan calls for; save the model again."
                )
            value = stored.get_tensor(name)
            if value.shape != tensor.shape:
                raise PlanError(
                    f"{name} is {tuple(value.shape)} in {directory} and {tuple(tensor.shape)} in the model."
                )
            tensor.copy_(value)
