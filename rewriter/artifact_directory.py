"""A directory that `subquad.save` wrote, read without the compiler: its manifest and its stored decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subquad.checkpoint_files import check_weights
from subquad.decoder import Decoder
from subquad.decoder_file import read_decoder
from subquad.drafter_file import read_drafters
from subquad.ir.errors import ArtifactError, SubquadError
from subquad.plan_file import read_plan
from subquad.speculation_words import planned
from subquad.tokenization import read_json

FORMAT = 1
MANIFEST = "subquad.json"
WEIGHTS = "model.safetensors"
PLAN = "plan.json"


def is_artifact(directory: Path) -> bool:
    """True for a directory that `save` wrote."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a saved directory; raises ArtifactError when it is missing, torn or of a newer format."""
    if not directory.is_dir():
        raise ArtifactError(f"{directory} does not exist or is not a directory.")
    if not is_artifact(directory):
        raise ArtifactError(
            f"{directory} has no {MANIFEST}, so it is not what `subquad rewrite` or `subquad.save` wrote."
        )
    try:
        manifest = read_json(directory / MANIFEST)
        form = int(manifest["format"])
        str(manifest["plan_hash"]), dict(manifest["source"])
    except (SubquadError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{directory / MANIFEST} is torn or not a manifest; save the model again.") from error
    if form > FORMAT:
        made = manifest.get("versions", {}).get("subquad", "a newer version")
        raise ArtifactError(
            f"{directory} has format {form}, written by subquad {made}; this version reads up to {FORMAT}: upgrade subquad."
        )
    return manifest


def stored_decoder(directory: Path) -> Decoder | None:
    """The decoder that `save` derived, None when there is none for this version of torch.

    Raises ArtifactError when the directory is not whole.
    """
    plan_hash = str(read_manifest(directory)["plan_hash"])
    if not (directory / WEIGHTS).is_file():
        raise ArtifactError(f"{directory} lacks {WEIGHTS}; save the model again.")
    check_weights(directory / WEIGHTS)
    decoder = read_decoder(directory, directory / WEIGHTS, plan_hash)
    if decoder is not None and (directory / PLAN).is_file():
        decoder.speculation, decoder.trained = planned(read_plan(directory / PLAN)), read_drafters(directory)
    return decoder
