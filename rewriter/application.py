"""Apply a plan to a model in place: rebind the forward, keep class, parameters and names, and be able to undo it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx
from torch import nn

from subquad.bound_forward import BoundForward
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        """A record for the copied module: its own graphs on the copied parameters."""
        root = copy.deepcopy(self.original.root, memo)
        original, mapping = copy_capture(replace(self.original, root=root), lambda value: copy.deepcopy(value, memo))
        applied, _ = copy_capture(replace(self.applied, root=root), lambda value: copy.deepcopy(value, memo))
        moved = tuple(replace(r, site=carry_site(r.site, mapping)) for r in self.replacements)
        copied = Rewritten(original, applied, moved, self.plan, self.report)
        memo[id(self)] = copied
        copied.redo = lambda: _bind(root, copied)
        copied.undo = lambda: _unbind(root, copied)
        return copied


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
        attach(root, sites)
        return lambda: _unbind(root, record)
    bound = BoundForward(root, record.applied)
    root.__dict__["forward"] = bound
    return lambda: _unbind(root, record)


def _unbind(root: nn.Module, record: Rewritten) -> None:
    if "forward" in root.__dict__:
        del root.__dict__["forward"]
    else:
        from subquad.runtime.hf_seam import detach

        detach(root)


def _has_seam(root: nn.Module, record: Rewritten) -> bool:
    """True for a Hugging Face model whose attention goes through the registry and whose masks it builds itself."""
    if not hasattr(root, "set_attn_implementation") or not hasattr(root, "config"):
        return False
    if any(r.call.operator == "recurrence" and r.site.folded != 1.0 for r in record.replacements):
        return False
    plain = {"full", "causal", "padding(attention_mask)", "causal & padding(attention_mask)"}
    if not all(
        "#" not in r.site.path and r.site.mask.family in plain and not r.site.biases and r.site.sinks is None
        for r in record.replacements
    ):
        return False
    return bool(type(root)._can_set_attn_implementation())  # type: ignore[attr-defined]


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
