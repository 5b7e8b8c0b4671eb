"""Apply a plan to a model in place: rebind forwards, keep class, parameters and names, and be able to undo it."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx
from torch import nn

from subquad.bound_forward import BoundForward
from subquad.capture import Capture
from subquad.graph_copy import carry_site, copy_capture
from subquad.ir.errors import SubquadError
from subquad.ir.graph import ancestors, rank_of
from subquad.ir.loop_rewrite import LOOP, LoopRewrite
from subquad.ir.network_rewrite import NETWORK, NetworkRewrite
from subquad.ir.plan import Plan
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report
from subquad.ir.rewrite import Rewrite
from subquad.ir.site import Site
from subquad.ir.trained import NOTHING, Trained
from subquad.ir.vocabulary import kind
from subquad.owners import owned_captures
from subquad.replacement import Replacement, learned_tensors, module_of_site, replacement, rewritten_capture

STATE = "_subquad"
"""Instance attribute of a rewritten module that holds its Rewritten record."""


@dataclass(eq=False)
class Rewritten:
    """What `rewrite` leaves on a module.

    original, applied: the capture before and after (the same parameter objects).  replacements: what was done.
    bound: by module path the rewritten graph that is its forward; none where Hugging Face's registry dispatches.
    loop: how the model's own decoding loop is rewritten, None when it is not.  trained: what was trained for its drafters.
    shares: calls of a language model's forward look for what the rows of their batch have in common.
    undo: puts the modules' own forwards back.
    """

    original: Capture
    applied: Capture
    replacements: tuple[Replacement, ...]
    plan: Plan
    report: Report = field(default_factory=Report)
    bound: dict[str, Capture] = field(default_factory=dict)
    loop: LoopRewrite | None = None
    trained: Trained = NOTHING
    shares: bool = False
    undo: Callable[[], None] = field(default=lambda: None, repr=False)
    redo: Callable[[], Callable[[], None]] = field(default=lambda: lambda: None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        """A record for the copied module: its own graphs on the copied parameters."""
        root = copy.deepcopy(self.original.root, memo)

        def moved(capture: Capture) -> tuple[Capture, dict[torch.fx.Node, torch.fx.Node]]:
            owner = replace(capture, root=copy.deepcopy(capture.root, memo))
            return copy_capture(owner, lambda value: copy.deepcopy(value, memo))

        original, mapping = moved(self.original)
        taken = tuple(replace(r, site=carry_site(r.site, mapping)) for r in self.replacements)
        bound = {path: moved(capture)[0] for path, capture in self.bound.items()}
        applied = moved(self.applied)[0]
        copied = Rewritten(
            original, applied, taken, self.plan, self.report, bound, self.loop, self.trained, self.shares
        )
        memo[id(self)] = copied
        copied.redo = lambda: _bind(root, copied)
        copied.undo = lambda: _unbind(root, copied)
        return copied


def rewritten(model: nn.Module) -> Rewritten | None:
    """The record on a rewritten module, None for any other."""
    return model.__dict__.get(STATE)


def apply_plan(
    capture: Capture, steps: list[tuple[Site, Rewrite]], plan: Plan, report: Report, loop: LoopRewrite | None = None,
    network: NetworkRewrite | None = None,
) -> nn.Module:  # fmt: skip
    """Rewrite the capture's root module in place and return it.

    steps: sites with the rewrite each one gets, already admitted.  Only the forwards of the smallest modules that own the
    sites are rebound.  Parameters that a rewrite adds become a submodule `subquad` of the site's module; all other parameter
    objects and names stay.
    """
    root = capture.root
    replacements = tuple(replacement(root, site, rewrite) for site, rewrite in steps)
    applied = rewritten_capture(capture, replacements)
    split = None if network is None else _network(applied, network, report)
    shares = network is not None and split is None and _shares_at_run_time(root, network, report)
    seam = (
        split is None
        and _has_seam(root, replacements)
        and _masks_only_hide(report.sites)
        and _all_dispatched(capture, report)
    )
    bound = {"": split} if split is not None else {} if seam else owned_captures(capture, replacements, applied)
    record = Rewritten(capture, applied, replacements, plan, report, bound, loop, shares=shares)
    record.redo = lambda: _bind(root, record)
    record.undo = record.redo()
    root.__dict__[STATE] = record
    root.__dict__["report"] = report
    return root


def _network(applied: Capture, network: NetworkRewrite, report: Report) -> Capture | None:
    """The whole graph rewritten; None where it cannot be, and the report then says why."""
    copied, _ = copy_capture(applied)
    done = network.rewrite(copied.graph)
    if isinstance(done, Refusal):
        report.refused.append(done)
        return None
    report.applied.append(network_entry(network, done))
    return copied


def _shares_at_run_time(root: nn.Module, network: NetworkRewrite, report: Report) -> bool:
    """Whether the forward of a language model is bound to one that compares the rows of each call; the refusal then goes."""
    can = getattr(root, "can_generate", None)
    taken = inspect.signature(type(root).forward).parameters
    if can is None or not can() or not {"input_ids", "attention_mask"} <= set(taken):
        return False
    report.refused.pop()
    report.applied.append(network_entry(network, "rows of a call are compared, and what they have in common runs once"))
    return True


def network_entry(network: NetworkRewrite, done: str) -> dict[str, Any]:
    """The report's words for a rewrite of the whole network; done: what it did."""
    return {"path": NETWORK, "pass": str(network), "contract": network.contract.value, "mask": "", "what": done}


def _bind(root: nn.Module, record: Rewritten) -> Callable[[], None]:
    for path, capture in record.bound.items():
        owner = root.get_submodule(path)
        owner.__dict__["forward"] = BoundForward(owner, capture)
    if not record.bound and record.replacements:
        from subquad.runtime.hf_seam import SeamSite, attach

        sites = {}
        for taken in record.replacements:
            learned = learned_tensors(root, taken)
            groups = {arg: tuple(learned[n] for n in names) for arg, names in taken.call.parameters.items()}
            sites[taken.site.path] = SeamSite(taken.call.operator, taken.call.spec, groups)
        attach(root, sites)
    if record.loop is not None:
        from subquad.speculative_generate import SpeculativeGenerate

        root.__dict__[LOOP] = SpeculativeGenerate(root, record.loop)
    if record.shares:
        from subquad.shared_forward import SharedForward

        root.__dict__["forward"] = SharedForward(root)
    return lambda: _unbind(root, record)


def _unbind(root: nn.Module, record: Rewritten) -> None:
    root.__dict__.pop(LOOP, None)
    if record.shares and "" not in record.bound:
        del root.__dict__["forward"]
    for path in record.bound:
        del root.get_submodule(path).__dict__["forward"]
    if not record.bound and record.replacements:
        from subquad.runtime.hf_seam import detach

        detach(root)


def _has_seam(root: nn.Module, replacements: tuple[Replacement, ...]) -> bool:
    """True for a Hugging Face model whose attention goes through the registry and whose masks it builds itself."""
    if not hasattr(root, "set_attn_implementation") or not hasattr(root, "config"):
        return False
    if any(r.call.operator == "recurrence" and r.site.folded != 1.0 for r in replacements):
        return False
    plain = {"full", "causal", "padding(attention_mask)", "causal & padding(attention_mask)"}
    if not all(
        "#" not in r.site.path
        and r.site.mask.family in plain
        and not (r.site.biases or r.site.gain or r.site.sinks is not None)
        for r in replacements
    ):
        return False
    return bool(type(root)._can_set_attn_implementation())  # type: ignore[attr-defined]


def _masks_only_hide(sites: list[Site]) -> bool:
    """True when the masks over queries and keys are read by the attentions alone: the registry has other masks made."""
    made = set(ancestors(source for site in sites for source in site.mask_sources))
    inside = made.union(*(site.absorbed for site in sites), (site.out for site in sites))
    masks = [node for node in made if node.op != "placeholder" and (rank_of(node) or 0) >= 4]
    return all(user in inside or kind(user) == "sym_size" for node in masks for user in node.users)


def _all_dispatched(capture: Capture, report: Report) -> bool:
    """True when each attention of the model, rewritten or not, reaches the registry once per site and no other does."""
    from subquad.runtime.hf_seam import dispatched

    refused = [refusal.path for refusal in report.refusals if refusal.kind != "projection"]
    expected = Counter(module_of_site(path) for path in (*(site.path for site in report.sites), *refused))

    def run() -> None:
        with torch.no_grad(), capture.state_kept():
            capture.call(capture.root, {name: value.clone() for name, value in capture.example.items()})

    return dispatched(capture.root, run) == expected


def restore(model: nn.Module) -> nn.Module:
    """Undo `rewrite`: the module's own forward runs again and added parameters are removed; returns the module.

    Raises SubquadError when the module is not a rewritten one.
    """
    from subquad.unrolled_run import unbind_loop

    record = rewritten(model)
    if record is None and unbind_loop(model):
        return model
    if record is None:
        raise SubquadError(f"{type(model).__name__} was not rewritten, so there is nothing to restore.")
    record.undo()
    for taken in record.replacements:
        if taken.call.parameters:
            owner, _, holder_name = taken.prefix.rpartition(".")
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
