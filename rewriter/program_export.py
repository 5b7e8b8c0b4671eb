"""Write a rewritten model as a .pt2 program that loads with torch and subquad alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from subquad.application import Rewritten
from subquad.environment import versions
from subquad.ir.errors import ArtifactError, first_line


def exported(record: Rewritten) -> ExportedProgram:
    """The rewritten graph as an ExportedProgram with symbolic batch and sequence sizes.

    Inputs are the captured tensors in order, outputs the leaves of the original's output as a tuple, so that no class of
    the model's package is needed to load it.  Raises ArtifactError when torch.export cannot take the graph.
    """
    inputs = tuple(record.applied.example[name] for name in record.applied.inputs)
    dynamic = tuple(dict.fromkeys(range(min(x.dim(), 2)), Dim.AUTO) for x in inputs)
    try:
        with torch.no_grad():
            program = torch.export.export(record.applied.graph, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ArtifactError(f"the rewritten model cannot be exported as a program: {first_line(error)}.") from error
    return program


def export_program(record: Rewritten, target: Path) -> Path:
    """Write exported(record) to `target`, beside it first; plan and versions travel in the archive's extra files."""
    program = exported(record)
    extra = {
        "subquad_plan.json": record.plan.to_json(),
        "subquad_versions.json": json.dumps(versions()),
        "subquad_imports.json": json.dumps(["subquad"]),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.stem}.{os.getpid()}.partial.pt2"
    try:
        torch.export.save(program, str(fresh), extra_files=extra)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
    return target
