"""The Triton kernels of a rewritten model: which there are, their sources, and binaries built ahead of time."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.application import rewritten
from subquad.codegen import SHARED_LIMITS, BuildReport, around_of, build_all, emit, operator_kernels
from subquad.ir.errors import ArtifactError, SubquadError, did_you_mean
from subquad.ir.graph import attribute
from subquad.ir.kernel_spec import DTYPES, KernelSpec
from subquad.ir.site import Site
from subquad.kernel_surroundings import surroundings_of
from subquad.kernels import RecurrenceSpec
from subquad.kernels.surroundings import Surroundings
from subquad.private_cache import written_beside
from subquad.progress import progress
from subquad.replacement import Replacement


@dataclass(frozen=True)
class EmittedKernel:
    """One kernel: its spec with its target, the sites that use it, the source file, what was built from it, if asked, and what
    it leaves outside of what stands in front of its sites.
    """

    spec: KernelSpec
    sites: tuple[str, ...]
    source: str
    built: BuildReport | None
    outside: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """The public words of an emitted kernel."""
        return {
            "hash": self.spec.hash,
            "op": self.spec.op,
            "part": self.spec.part,
            "source": self.source,
            "sites": list(self.sites),
            "around": around_of(self.spec).words(),
            "outside": list(self.outside),
            "spec": asdict(self.spec),
            "target": self.spec.target,
            "build": self.built
            and {
                "binary": self.built.path.name,
                "shared_bytes": self.built.shared_bytes,
                "limit_bytes": self.built.limit_bytes,
                "registers": self.built.registers,
                "spills": self.built.spills,
                "seconds": round(self.built.seconds, 3),
            },
        }


def kernel_specs(model: nn.Module, target: str = "cuda:90") -> dict[KernelSpec, tuple[Site, ...]]:
    """The distinct kernels of a rewritten model for a target, forward and backward, with the sites that use each.

    Beside those that the model runs there are, where a norm or a rotary embedding is proved to stand in front of a site,
    forward kernels that read the rows before it (`spec.around`), for a program of one's own.

    Raises SubquadError when the model was not rewritten or computes in a type that has no kernel.
    """
    record = rewritten(model)
    if record is None:
        raise SubquadError(f"{type(model).__name__} was not rewritten, so it has no kernels.")
    found: dict[KernelSpec, tuple[Site, ...]] = {}
    for replacement in record.replacements:
        for spec in _specs(record.original.root, replacement, target):
            found[spec] = (*found.get(spec, ()), replacement.site)
    return found


def _specs(root: nn.Module, replacement: Replacement, target: str) -> list[KernelSpec]:
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
        base = KernelSpec(
            call.operator, call.spec, dtype, site.head_dim, site.value_dim,
            flags=tuple(flags), tables=kinds, target=target,
        )  # fmt: skip
        return [*operator_kernels(base), *_with_surroundings(base, site, keys_too=False)]
    names = call.parameters.get("feature_q", ())
    features = attribute(root, f"{replacement.prefix}.{names[0]}").shape[-1] if names else 0
    gate = ("gate",) if call.parameters.get("window_gate") else ()
    sizes = (site.head_dim, site.value_dim, features)
    base = KernelSpec(call.operator, call.spec, dtype, *sizes, flags=gate, target=target)
    windowed = RecurrenceSpec.parse(call.spec).window > 0
    return [*operator_kernels(base), *_with_surroundings(base, site, keys_too=not windowed)]


def _with_surroundings(base: KernelSpec, site: Site, keys_too: bool) -> list[KernelSpec]:
    """The kernels of the operator that take in what is proved to stand in front of the site."""
    around, _ = surroundings_of(site, keys_too)
    return [spec for spec in operator_kernels(replace(base, around=around.json())) if not around_of(spec).empty]


def _is_bool(node: torch.fx.Node) -> bool:
    value = node.meta.get("val", node.meta.get("example_value"))
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def emit_kernels(model: nn.Module, directory: Path, targets: tuple[str, ...] = ()) -> list[EmittedKernel]:
    """Write the sources of a model's kernels to a new directory and build them for `targets`; no GPU is needed.

    Each target has kernels of its own, because its schedule follows from its registers.

    directory: must not exist, or be empty.  targets: any of cuda:80, cuda:90, cuda:100, hip:gfx942; none writes sources only.
    Raises SubquadError for an unknown target, a kernel that does not fit the target's shared memory, or missing triton.
    """
    for target in targets:
        if target not in SHARED_LIMITS:
            raise SubquadError(f"the target {target!r} is unknown; {did_you_mean(target, SHARED_LIMITS)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ArtifactError(f"{directory} exists; give the name of a new directory.")
    found = [kernel_specs(model, target) for target in targets] or [kernel_specs(model)]
    sites = {spec: owners for of_target in found for spec, owners in of_target.items()}
    emitted = []
    try:
        with written_beside(directory) as fresh, progress("building kernels", len(sites)) as advance:
            made = build_all(list(sites)) if targets else itertools.repeat(None)
            for (spec, owners), built in zip(sites.items(), made, strict=False):
                name = f"{spec.op}_{spec.part}_{spec.hash[:12]}"
                (fresh / f"{name}.py").write_text(emit(spec), encoding="utf-8")
                kept = _kept(built, spec, fresh, name) if built else None
                paths = tuple(site.path for site in owners)
                emitted.append(EmittedKernel(spec, paths, f"{name}.py", kept, _outside(spec, owners)))
                advance(1, f"{name} for {spec.target}")
            (fresh / "kernels.json").write_text(
                json.dumps([kernel.json() for kernel in emitted], indent=1), encoding="utf-8"
            )
    except (RuntimeError, ValueError) as error:
        raise SubquadError(str(error).strip().splitlines()[0]) from error
    return emitted


def _outside(spec: KernelSpec, owners: tuple[Site, ...]) -> tuple[str, ...]:
    """What a kernel with surroundings leaves to the caller in front of its sites; for sites that have none, why."""
    keys_too = not Surroundings.parse(spec.around).k.empty
    told = [surroundings_of(site, keys_too) for site in owners]
    return tuple(
        dict.fromkeys(sentence for moved, outside in told if spec.around or moved.empty for sentence in outside)
    )


def _kept(made: BuildReport, spec: KernelSpec, directory: Path, name: str) -> BuildReport:
    if not made.fits:
        raise SubquadError(
            f"{name} needs {made.shared_bytes} bytes of shared memory on {spec.target}, which has {made.limit_bytes}."
        )
    binary = directory / f"{name}.{spec.target.replace(':', '_')}{made.path.suffix}"
    shutil.copyfile(made.path, binary)
    return replace(made, path=binary)
