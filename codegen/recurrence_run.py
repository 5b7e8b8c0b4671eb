"""Runs the recurrence kernels on rows of tokens: what one forward pass keeps, and one backward pass from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subquad.codegen.recurrence_parts import Parts
from subquad.codegen.recurrence_template import backward_parts, forward_parts
from subquad.codegen.running import dtype_name, launch, target_of
from subquad.codegen.schedule import Schedule, scheduled
from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels import RecurrenceSpec

Values = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Sequences that lie one after the other: first row of each and the end [N + 1], first chunk of each and the end
    [N + 1], sequence of each chunk (-1: none), rows in all, tokens in a chunk.
    """

    bounds: Tensor
    chunks: Tensor
    owner: Tensor
    total: int
    chunk: int

    @property
    def count(self) -> int:
        """Sequences."""
        return self.bounds.shape[0] - 1


@functools.lru_cache(maxsize=64)
def batch_rows(batch: int, length: int, chunk: int, device: torch.device) -> Rows:
    """The rows of a batch of equal lengths."""
    each = -(-length // chunk)
    steps = torch.arange(batch + 1, device=device)
    owner = torch.arange(batch * each, device=device) // max(each, 1)
    return Rows(steps * length, steps * each, owner, batch * length, chunk)


def packed_rows(cu_seqlens: Tensor, total: int, chunk: int) -> Rows:
    """The rows of packed sequences; there may be more chunk numbers than chunks, so that no length is read back."""
    bounds = cu_seqlens.to(torch.int64).contiguous()
    counts = (bounds.diff() + chunk - 1) // chunk
    chunks = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    number = torch.arange(total // chunk + bounds.shape[0] - 1, device=bounds.device)
    owner = torch.searchsorted(chunks[1:].contiguous(), number, right=True)
    return Rows(bounds, chunks, torch.where(owner < bounds.shape[0] - 1, owner, -1), total, chunk)


@dataclass(frozen=True)
class Pass:
    """One recurrence over rows: the spec its kernels are printed from (without part), its rows, its tensors by name."""

    spec: KernelSpec
    rows: Rows
    schedule: Schedule
    heads: int
    values: Values

    @property
    def what(self) -> RecurrenceSpec:
        """The operator's spec."""
        return RecurrenceSpec.parse(self.spec.operator)

    def part(self, name: str) -> KernelSpec:
        """The KernelSpec of one kernel of this pass."""
        return replace(scheduled(replace(self.spec, part=name), self.schedule), block_q=self.rows.chunk)

    def run(self, name: str) -> None:
        """Launch one kernel over the grid it needs."""
        spec = self.part(name)
        parts = Parts(spec)
        value_blocks = -(-spec.value_dim // parts.value_block)
        if name in ("states", "grad_states", "step"):
            grid: tuple[int, ...] = (value_blocks, self.rows.count, self.heads)
        elif name in ("output", "grad_values"):
            grid = (self.rows.owner.shape[0], self.heads, value_blocks)
        elif name == "grad_keys" or (name in ("cumulate", "decumulate") and parts.decay == "channel"):
            grid = (self.rows.owner.shape[0], self.heads, -(-parts.features // parts.slice))
        else:
            grid = (self.rows.owner.shape[0], self.heads)
        launch(spec, self.values, grid)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor beside the inputs."""
        return torch.empty(shape, dtype=dtype, device=self.rows.bounds.device)


def prepared(spec: KernelSpec, rows: Rows, schedule: Schedule, heads: int, values: Values) -> Pass:
    """A pass with the tensors that every kernel of it reads or writes; `values` holds the inputs."""
    table = {"bounds_ptr": rows.bounds, "chunks_ptr": rows.chunks, "owner_ptr": rows.owner, "heads": heads}
    made = Pass(spec, rows, schedule, heads, values | table | {"sequences": rows.count})
    parts = Parts(spec)
    features, value_dim, chunks = parts.features, spec.value_dim, rows.owner.shape[0]
    element = getattr(torch, spec.dtype)
    between = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
    found = made.values
    if parts.decay != "none":
        found["G_ptr"] = made.empty(rows.total, heads, *([features] if parts.decay == "channel" else []))
    if parts.delta:
        found["inverse_ptr"] = made.empty(rows.total, heads, rows.chunk)
        found["u_ptr"] = found["corrected_ptr"] = made.empty(rows.total, heads, value_dim, dtype=element)
        found["w_ptr"] = made.empty(rows.total, heads, features, dtype=element)
    found["states_ptr"] = made.empty(chunks, heads, features, value_dim, dtype=between)
    found["final_ptr"] = made.empty(rows.count, heads, features, value_dim)
    if parts.sums:
        found["sums_ptr"] = made.empty(chunks, heads, features)
        found["final_sum_ptr"] = made.empty(rows.count, heads, features)
    found.setdefault("has_state", int("state_ptr" in found))
    for name, like in (("state_ptr", "final_ptr"), ("state_sum_ptr", "final_sum_ptr")):
        if like in found:
            found.setdefault(name, found[like])  # a pointer that is not read
    return made


def forward(made: Pass, output: bool = True) -> None:
    """Fill o, the final state and what a backward pass reads; without `output` all but o."""
    for name in forward_parts(made.what):
        if name != "output" or output:
            made.run(name)


def raw(made: Pass) -> Pass:
    """The same pass without normaliser and scale: numerator o [R, H, V] and mass [R, H] (empty without sums) in fp32."""
    mass = made.empty(*((made.rows.total, made.heads) if made.what.sums else (0,)))
    numerator = made.empty(made.rows.total, made.heads, made.spec.value_dim)
    spec = replace(made.spec, flags=tuple({*made.spec.flags, "raw"}))
    return replace(made, spec=spec, values=made.values | {"o_ptr": numerator, "mass_ptr": mass})


def from_behind(made: Pass, output: Tensor | None = None) -> Pass:
    """The pass over the same rows from the last token to the first, which adds to what the raw pass `made` has read: in
    the same tensors, or with normaliser and scale in `output`.
    """
    flags = {*made.spec.flags, "reverse"} - (set() if output is None else {"raw"})
    values = made.values | {"has_state": 0, "part_ptr": made.values["o_ptr"], "part_mass_ptr": made.values["mass_ptr"]}
    values |= {} if output is None else {"o_ptr": output}
    return prepared(replace(made.spec, flags=tuple(flags)), made.rows, made.schedule, made.heads, values)


def backward(made: Pass, do: Tensor, dmass: Tensor | None, dfinal: Tensor, dfinal_sum: Tensor | None) -> Values:
    """Gradients {dq, dk [R, H, F], dv [R, H, V], dg, dbeta, dinitial, dinitial_sum} in fp32 of a raw pass over phi in
    memory after its `forward`, for those of the numerator, the mass and the final state.
    """
    parts = Parts(made.spec)
    rows, features = made.rows, parts.features
    found = made.values
    found |= {"do_ptr": do.float().contiguous(), "dfinal_ptr": dfinal.float().contiguous()}
    found["dstates_ptr"] = torch.empty_like(found["states_ptr"])
    found["dinitial_ptr"] = torch.empty_like(found["final_ptr"])
    if parts.sums:
        assert dmass is not None
        assert dfinal_sum is not None
        found |= {"dmass_ptr": dmass.float().contiguous(), "dfinal_sum_ptr": dfinal_sum.float().contiguous()}
        found |= {
            "dsums_ptr": torch.empty_like(found["sums_ptr"]),
            "dinitial_sum_ptr": torch.empty_like(found["final_sum_ptr"]),
        }
    for name in ("dq_ptr", "dk_ptr", *(["dw_ptr"] if parts.delta else [])):
        found[name] = made.empty(rows.total, made.heads, features)
    found["dv_ptr"] = made.empty(rows.total, made.heads, made.spec.value_dim)
    if parts.delta:
        found["dbeta_ptr"] = made.empty(rows.total, made.heads)
    slices = -(-features // parts.slice)
    if parts.decay == "scalar":
        found["dG_ptr"] = made.empty(slices, rows.total, made.heads)
    elif parts.decay == "channel":
        found["dG_ptr"] = made.empty(rows.total, made.heads, features)
    for name in backward_parts(made.what):
        if name == "decumulate":
            found["dg_ptr"] = torch.zeros_like(found["dG_ptr"]) if parts.reverse else found["dG_ptr"]
        made.run(name)
        if name == "grad_keys" and parts.decay == "scalar":
            found["dG_ptr"] = found["dG_ptr"].sum(0) if slices > 1 else found["dG_ptr"][0]
    names = {"dq": "dq_ptr", "dk": "dk_ptr", "dv": "dv_ptr", "dg": "dg_ptr", "dbeta": "dbeta_ptr"}
    names |= {"dinitial": "dinitial_ptr", "dinitial_sum": "dinitial_sum_ptr"}
    return {name: found[key] for name, key in names.items() if key in found}


def core_spec(what: RecurrenceSpec, like: Tensor, features: int, value_dim: int, flags: tuple[str, ...]) -> KernelSpec:
    """The spec of a raw pass over phi(q), phi(k) of `features` columns in memory, with the update and decay of `what`;
    additive weights are channel decays, or plain shares where all tokens are read.
    """
    kinds = {"head": "token", "additive": "channel" if what.causal else "none"}
    decay = kinds.get(what.decay, what.decay)
    normaliser = "sum" if what.normaliser == "sum" else "none"
    core = RecurrenceSpec(
        ("x",), 1.0, decay=decay, update=what.update, normaliser=normaliser, causal=what.causal  # type: ignore[arg-type]
    )  # fmt: skip
    return KernelSpec(
        "recurrence", core.json(), dtype_name(like), features, value_dim, flags=(*flags, "raw"), target=target_of(like)
    )
