"""The Triton kernels of a rewritten model: which there are, their sources, and binaries built ahead of time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.application import rewritten
from subquad.codegen import SHARED_LIMITS, BuildReport, build_all, emit, operator_kernels
from subquad.ir.errors import ArtifactError, SubquadError, did_you_mean
from subquad.ir.graph import attribute
from subquad.ir.kernel_spec import DTYPES, KernelSpec
from subquad.private_cache import written_beside
from subquad.progress import progress
from subquad.replacement import Replacement


@dataclass(frozen=True)
class EmittedKernel:
    """One kernel: its spec, the sites that use it, the source file, and what was built from it by target."""

    spec: KernelSpec
    sites: tuple[str, ...]
    source: str
    builds: dict[str, BuildReport]

    def json(self) -> dict[str, Any]:
        """The public words of an emitted kernel."""
        return {
            "hash": self.spec.hash,
            "op": self.spec.op,
            "part": self.spec.part,
            "source": self.source,
            "sites": list(self.sites),
            "spec": dataclasses.asdict(self.spec),
            "builds": {
                target: {
                    "binary": made.path.name,
                    "shared_bytes": made.shared_bytes,
                    "limit_bytes": made.limit_bytes,
                    "registers": made.registers,
                    "spills": made.spills,
                    "seconds": round(made.seconds, 3),
                }
                for target, made in self.builds.items()
            },
        }


def kernel_specs(model: nn.Module) -> dict[KernelSpec, tuple[str, ...]]:
    """The distinct kernels that a rewritten model runs on a GPU, forward and backward, with the sites that use each.

    Raises SubquadError when the model was not rewritten or computes in a type that has no kernel.
    """
    record = rewritten(model)
    if record is None:
        raise SubquadError(f"{type(model).__name__} was not rewritten, so it has no kernels.")
    found: dict[KernelSpec, tuple[str, ...]] = {}
    for replacement in record.replacements:
        for spec in _specs(record.original.root, replacement):
            found[spec] = (*found.get(spec, ()), replacement.site.path)
    return found


def _specs(root: nn.Module, replacement: Replacement) -> list[KernelSpec]:
    site, call = replacement.site, replacement.call
    value = site.out.meta.get("val", site.out.meta.get("example_value"))
    dtype = str(value.dtype if isinstance(value, torch.Tensor) else torch.float32).removeprefix("torch.")
    if dtype not in DTYPES:
        raise SubquadError(
            f"{site.path} computes in {dtype}, for which there is no kernel; known: {', '.join(DTYPES)}."
        )
    if call.operator == "softmax_attention":
        flags = [name for name, used in (("bias", site.biases), ("sinks", site.sinks is not None)) if used]
        kinds = tuple("int8" if _is_bool(table.node) else "int64" for table in site.mask.tables)
        return operator_kernels(
            KernelSpec(call.operator, call.spec, dtype, site.head_dim, site.value_dim, flags=tuple(flags), tables=kinds)
        )
    names = call.parameters.get("feature_q", ())
    features = attribute(root, f"{replacement.prefix}.{names[0]}").shape[-1] if names else 0
    gate = ("gate",) if call.parameters.get("window_gate") else ()
    return operator_kernels(
        KernelSpec(call.operator, call.spec, dtype, site.head_dim, site.value_dim, features, flags=gate)
    )


def _is_bool(node: torch.fx.Node) -> bool:
    value = node.meta.get("val", node.meta.get("example_value"))
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def emit_kernels(model: nn.Module, directory: Path, targets: tuple[str, ...] = ()) -> list[EmittedKernel]:
    """Write the sources of a model's kernels to a new directory and build them for `targets`; no GPU is needed.

    directory: must not exist, or be empty.  targets: any of cuda:80, cuda:90, cuda:100, hip:gfx942; none writes sources only.
    Raises SubquadError for an unknown target, a kernel that does not fit the target's shared memory, or missing triton.
    """
    for target in targets:
        if target not in SHARED_LIMITS:
            raise SubquadError(f"the target {target!r} is unknown; {did_you_mean(target, SHARED_LIMITS)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ArtifactError(f"{directory} exists; give the name of a new directory.")
    specs = kernel_specs(model)
    emitted = []
    try:
        with (
            written_beside(directory) as fresh,
            progress("building kernels", len(specs) * max(1, len(targets))) as advance,
        ):
            jobs = [(dataclasses.replace(spec, target=target), target) for spec in specs for target in targets]
            made = iter(build_all(jobs))
            for spec, sites in specs.items():
                name = f"{spec.op}_{spec.part}_{spec.hash[:12]}"
                (fresh / f"{name}.py").write_text(emit(spec), encoding="utf-8")
                builds = {}
                for target in targets:
                    builds[target] = _kept(next(made), target, fresh, name)
                    advance(1, f"{name} for {target}")
                emitted.append(EmittedKernel(spec, sites, f"{name}.py", builds))
            (fresh / "kernels.json").write_text(
                json.dumps([kernel.json() for kernel in emitted], indent=1), encoding="utf-8"
            )
    except (RuntimeError, ValueError) as error:
        raise SubquadError(str(error).strip().splitlines()[0]) from error
    return emitted


def _kept(made: BuildReport, target: str, directory: Path, name: str) -> BuildReport:
    if not made.fits:
        raise SubquadError(
            f"{name} needs {made.shared_bytes} bytes of shared memory on {target}, which has {made.limit_bytes}."
        )
    binary = directory / f"{name}.{target.replace(':', '_')}{made.path.suffix}"
    shutil.copyfile(made.path, binary)
    return dataclasses.replace(made, path=binary)
