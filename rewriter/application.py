"""Apply a plan to a model in place: rebind the forward, keep class, parameters and names, and be able to undo it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.utils import _pytree as pytree

from subquad.capture import Capture
from subquad.emission import PARAMETERS, emit_site
from subquad.graph_copy import carry_site, copy_capture
from subquad.ir.errors import SubquadError
from subquad.ir.graph import attribute, hang
from subquad.ir.plan import Plan
from subquad.ir.report import Report
from subquad.ir.rewrite import Rewrite, SiteOperator
from subquad.ir.site import Site
from subquad.passes.canonicalize.tidy import tidy

STATE = "_subquad"
"""Instance attribute of a rewritten module that holds its Rewritten record."""


@dataclass(frozen=True)
class Replacement:
    """One site with the rewrite that takes it, the operator it becomes, and where its learned tensors live."""

    site: Site
    rewrite: Rewrite
    call: SiteOperator
    prefix: str


@dataclass(eq=False)
class Rewritten:
    """What `rewrite` leaves on a module.

    original, applied: the capture before and after (the same parameter objects).  replacements: what was done.
    undo: puts the module's own forward back.
    """

    original: Capture
    applied: Capture
    replacements: tuple[Replacement, ...]
    plan: Plan
    report: Report = field(default_factory=Report)
    undo: Callable[[], None] = field(default=lambda: None, repr=False)
    redo: Callable[[], Callable[[], None]] = field(default=lambda: lambda: None, repr=False)


def rewritten(model: nn.Module) -> Rewritten | None:
    """The record on a rewritten module, None for any other."""
    return model.__dict__.get(STATE)


def apply_plan(capture: Capture, steps: list[tuple[Site, Rewrite]], plan: Plan, report: Report) -> nn.Module:
    """Rewrite the capture's root module in place and return it.

    steps: sites with the rewrite each one gets, already admitted.  Parameters that a rewrite adds become a submodule
    `subquad` of the site's module; all other parameter objects and names stay.
    """
    root = capture.root
    replacements = tuple(_replacement(root, site, rewrite) for site, rewrite in steps)
    applied = rewritten_capture(capture, replacements)
    record = Rewritten(capture, applied, replacements, plan, report)
    record.redo = lambda: _bind(root, record)
    record.undo = record.redo()
    root.__dict__[STATE] = record
    root.__dict__["report"] = report
    return root


def rewritten_capture(capture: Capture, replacements: tuple[Replacement, ...]) -> Capture:
    """A copy of the capture in which every replacement's site is one operator call."""
    applied, mapping = copy_capture(capture)
    for replacement in replacements:
        learned = _learned(capture.root, replacement)
        for name, value in learned.items():
            hang(applied.graph, f"{replacement.prefix}.{name}", value)
        emit_site(applied.graph, carry_site(replacement.site, mapping), replacement.call, learned, replacement.prefix)
    tidy(applied.graph)
    return applied


def _replacement(root: nn.Module, site: Site, rewrite: Rewrite) -> Replacement:
    path, _, number = site.path.partition("#")
    owner = path.split("@")[0]
    try:
        module = root.get_submodule(owner)
    except AttributeError:
        owner, module = "", root
    holder_name = PARAMETERS + number
    prefix = f"{owner}.{holder_name}" if owner else holder_name
    initial = rewrite.parameters(site)
    if initial and not hasattr(module, holder_name):
        holder = nn.Module()
        reference = next(iter(module.parameters()), None)
        for name, value in initial.items():
            moved = value if reference is None else value.to(reference.device)
            holder.register_parameter(name, nn.Parameter(moved))
        module.add_module(holder_name, holder)
    return Replacement(site, rewrite, rewrite.operator(site), prefix)


def _learned(root: nn.Module, replacement: Replacement) -> dict[str, torch.Tensor]:
    names = [name for names in replacement.call.parameters.values() for name in names]
    return {name: attribute(root, f"{replacement.prefix}.{name}") for name in names}


def _bind(root: nn.Module, record: Rewritten) -> Callable[[], None]:
    if _has_seam(root, record):
        from subquad.runtime.hf_seam import SeamSite, attach

        sites = {
            r.site.path: SeamSite(
                r.call.operator, r.call.spec,
                {arg: tuple(_learned(root, r)[n] for n in names) for arg, names in r.call.parameters.items()},
            )
            for r in record.replacements
        }  # fmt: skip
        return attach(root, sites)
    bound = BoundForward(root, record.applied)
    root.__dict__["forward"] = bound

    def undo() -> None:
        root.__dict__.pop("forward", None)

    return undo


def _has_seam(root: nn.Module, record: Rewritten) -> bool:
    """True for a Hugging Face model whose attention goes through the registry and whose masks it builds itself."""
    if not hasattr(root, "set_attn_implementation") or not hasattr(root, "config"):
        return False
    plain = {"full", "causal", "padding(attention_mask)", "causal & padding(attention_mask)"}
    if not all(
        "#" not in r.site.path and r.site.mask.family in plain and not r.site.biases and r.site.sinks is None
        for r in record.replacements
    ):
        return False
    return bool(type(root)._can_set_attn_implementation())


class BoundForward:
    """The forward of a rewritten module: runs the rewritten graph on the module's current parameters.

    A call with other arguments than the captured ones, in another dtype or device, or in training mode with dropout,
    runs the original forward and warns once, because the graph would not be the same function.
    """

    def __init__(self, root: nn.Module, capture: Capture) -> None:
        self.root, self.capture = root, capture
        self.signature = inspect.signature(type(root).forward)
        self.attributes = [
            n.target for n in capture.graph.graph.nodes if n.op == "get_attr" and hasattr(root, n.target.split(".")[0])
        ]
        self.dtypes = {name: self._key(attribute(root, name)) for name in self.attributes}
        self.warned: set[str] = set()

    @staticmethod
    def _key(tensor: torch.Tensor) -> tuple[torch.dtype, str]:
        return tensor.dtype, tensor.device.type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs, why = self._inputs(args, kwargs)
        why = why or self._stale()
        if why is not None:
            if why not in self.warned:
                self.warned.add(why)
                warnings.warn(f"subquad ran the original forward of {type(self.root).__name__}: {why}.", stacklevel=2)
            return type(self.root).forward(self.root, *args, **kwargs)
        leaves = self.capture.graph(*inputs)
        if self.capture.out_spec is None:
            return leaves
        return pytree.tree_unflatten(list(leaves), self.capture.out_spec)

    def _stale(self) -> str | None:
        if self.root.training and any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in self.root.modules()
        ):
            return "it is in training mode with dropout"
        for name in self.attributes:
            live = attribute(self.root, name)
            if self._key(live) != self.dtypes[name]:
                return f"{name} is now {live.dtype} on {live.device.type}, it was captured as {self.dtypes[name][0]}"
            if attribute(self.capture.graph, name) is not live:
                hang(self.capture.graph, name, live)
        return None

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], str | None]:
        try:
            bound = self.signature.bind(self.root, *args, **kwargs)
        except TypeError as error:
            return [], str(error)
        bound.apply_defaults()
        leaves = dict(_named_leaves(self.signature, bound))
        inputs = []
        for name in self.capture.inputs:
            if not isinstance(leaves.get(name), torch.Tensor):
                return [], f"it was captured with a tensor `{name}`, which this call does not give"
            inputs.append(leaves.pop(name))
        for name, value in leaves.items():
            if isinstance(value, torch.Tensor):
                return [], f"it was captured without `{name}`"
            if name in self.capture.constants and self.capture.constants[name] != value:
                return [], f"it was captured with {name}={self.capture.constants[name]!r}"
        return inputs, None


def _named_leaves(signature: inspect.Signature, bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """Arguments flattened under the names that torch.export gives its placeholders."""
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            for key, item in value.items():
                yield from _leaves(key, item)
        else:
            yield from _leaves(name, value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        for n, item in enumerate(value):
            yield from _leaves(f"{name}_{n}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}_{key}", item)
    else:
        yield name, value


def restore(model: nn.Module) -> nn.Module:
    """Undo `rewrite`: the module's own forward runs again and added parameters are removed; returns the module.

    Raises SubquadError when the module is not a rewritten one.
    """
    record = rewritten(model)
    if record is None:
        raise SubquadError(f"{type(model).__name__} was not rewritten, so there is nothing to restore.")
    record.undo()
    for replacement in record.replacements:
        if replacement.call.parameters:
            owner, _, holder_name = replacement.prefix.rpartition(".")
            model.get_submodule(owner)._modules.pop(holder_name, None)
    model.__dict__.pop(STATE, None)
    model.__dict__.pop("report", None)
    return model


@dataclass(frozen=True)
class AppliedSite:
    """One rewritten site of a module: its path, the owning module, what the rewrite added (by name), and the rewrite."""

    path: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    rewrite: Rewrite


def applied_sites(model: nn.Module) -> list[AppliedSite]:
    """The rewritten sites in execution order; empty for a module that was not rewritten."""
    record = rewritten(model)
    found = []
    for replacement in record.replacements if record is not None else ():
        owner, _, holder = replacement.prefix.rpartition(".")
        module = model.get_submodule(owner)
        learned = module._modules.get(holder)
        parameters = dict(learned.named_parameters()) if learned is not None else {}
        found.append(AppliedSite(replacement.site.path, module, parameters, replacement.rewrite))
    return found


@contextmanager
def original_forward(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block a rewritten module runs its original forward; its parameters stay."""
    record = rewritten(model)
    if record is None:
        yield model
        return
    record.undo()
    try:
        yield model
    finally:
        record.undo = record.redo()


def rebind(model: nn.Module) -> nn.Module:
    """Apply a module's own plan again after its tree changed (adapters injected or merged); learned tensors are kept.

    A Hugging Face model needs nothing, because its attention modules still run their own forward.
    """
    record = rewritten(model)
    if record is None or "forward" not in model.__dict__:
        return model
    from subquad.capture import capture
    from subquad.recognition import recognise

    record.undo()
    constants = {name: value for name, value in record.original.constants.items() if value is not None}
    captured = capture(model, {**record.original.example, **constants})
    fresh = recognise(captured, Report())
    by_path = {site.path: site for site in fresh.sites}
    steps = [(by_path[r.site.path], r.rewrite) for r in record.replacements]
    return apply_plan(captured, steps, record.plan, record.report)
