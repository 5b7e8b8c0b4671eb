"""Find the smallest modules that own the sites: each is captured alone and must show the same sites there."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from itertools import takewhile
from typing import Any

import sympy
import torch
import torch.fx
from torch import nn
from torch.utils import _pytree as pytree

from subquad.bound_forward import own_hooks_lifted
from subquad.capture import Capture, ProgramModule, capture
from subquad.capture_guards import fixed_size
from subquad.equal_modules import Footprints, can_move, moved_capture
from subquad.ir.errors import CaptureError
from subquad.ir.graph import ancestors, module_path, value_of
from subquad.ir.report import Report
from subquad.ir.site import Site
from subquad.lifting import CONSTANTS
from subquad.recognition import recognise
from subquad.replacement import Replacement, module_of_site, rewritten_capture

Call = tuple[tuple[Any, ...], dict[str, Any]]


def owned_captures(whole: Capture, replacements: tuple[Replacement, ...], applied: Capture) -> dict[str, Capture]:
    """The rewritten graphs to bind, by the path of the module each one is the forward of; none for no replacement.

    whole: the root's capture.  applied: the same, rewritten.  A site goes to the innermost enclosing module that a run on
    the example inputs calls once, with tensors and no numbers, and in whose own capture the site is found again and becomes
    the same operator: there a mask must be proved from what the module itself is given.  Where none is, it is the root, and
    then `applied` is the forward of the root and of nothing else.
    """
    members: dict[str, list[Replacement]] = {}
    for taken in replacements:
        members.setdefault(module_of_site(taken.site.path), []).append(taken)
    if not members:
        return {}
    if "" in members or isinstance(whole.root, ProgramModule | torch.fx.GraphModule):
        return {"": applied}
    members = _lifted(members)
    if "" in members:
        return {"": applied}
    calls = _calls(whole, {path for start in members for path in _enclosing(start)})
    alone = _Alone(whole)
    found: dict[str, Capture] = {}
    while waiting := [path for path in members if path not in found]:
        path = waiting[0]
        for inner in [known for known in members if known.startswith(f"{path}.")]:
            members[path] += members.pop(inner)
            found.pop(inner, None)
        owned = None if path not in calls else alone.rewritten(path, calls[path], members[path])
        if owned is not None:
            found[path] = owned
            continue
        parent = path.rpartition(".")[0]
        if not parent:
            return {"": applied}
        members.setdefault(parent, []).extend(members.pop(path))
        found.pop(parent, None)
    return found


def _enclosing(path: str) -> list[str]:
    """The path itself and every module path above it, the root aside."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _calls(whole: Capture, paths: set[str]) -> dict[str, Call]:
    """What each module is called with when the root runs on its example inputs, for those called exactly once and alike.

    A root may hand down a mask only when there is padding: what a module gets must have the same form with some.
    """
    found: dict[str, Call] | None = None
    for example in (whole.example, _padded(whole.example)):
        recorded = _recorded(whole, paths, example)
        once = {path: calls[0] for path, calls in recorded.items() if len(calls) == 1 and not _is_nested(calls[0])}
        if found is None:
            found = once
        else:
            found = {p: call for p, call in found.items() if p in once and _signature(once[p]) == _signature(call)}
    return found or {}


def _padded(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The example with the last column of the first row hidden in every mask of ones."""
    changed = {}
    for name, value in example.items():
        is_mask = value.dim() == 2 and not value.dtype.is_floating_point and bool((value == 1).all())
        changed[name] = value.clone() if is_mask else value
        if is_mask:
            changed[name][0, -1] = 0
    return changed


def _recorded(whole: Capture, paths: set[str], example: dict[str, torch.Tensor]) -> dict[str, list[Call]]:
    recorded: dict[str, list[Call]] = {}
    with ExitStack() as stack:
        for path in paths:
            try:
                module = whole.root.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(module, torch.jit.ScriptModule):  # compiled: it takes no hook and no other forward
                continue

            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                recorded.setdefault(path, []).append(pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs)))

            stack.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        try:
            with torch.no_grad(), whole.state_kept():
                whole.call(whole.root, {name: value.clone() for name, value in example.items()})
        except Exception:  # a root that cannot be called by its captured names is rebound whole
            return {}
    return recorded


def _is_nested(call: Call) -> bool:
    """True for a call with nested tensors, which nn.TransformerEncoder makes of padded rows and no graph takes."""
    return any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in pytree.tree_leaves(call))


def _signature(call: Call) -> Any:
    """Equal for calls alike, so that of equal layers only the first is tried in vain."""
    leaves, structure = pytree.tree_flatten(call)
    return str(structure), tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)


class _Alone:
    """Modules captured alone; those that the root's graph runs alike are captured once."""

    def __init__(self, whole: Capture) -> None:
        self.root = whole.root
        self.footprints = Footprints(whole)
        self.known: dict[Any, tuple[Capture, list[Site]] | None] = {}

    def rewritten(self, path: str, call: Call, members: list[Replacement]) -> Capture | None:
        """The module's own graph with its sites replaced; None where that would not be the same in every call."""
        found = self._captured(path, call)
        if found is None:
            return None
        captured, held = found
        sites = {_joined(path, site.path): site for site in held}
        moved = []
        for taken in members:
            site = sites.get(taken.site.path)
            if site is None or not _same(site, taken):
                return None
            moved.append(replace(taken, site=site, prefix=taken.prefix.removeprefix(f"{path}.")))
        return rewritten_capture(captured, tuple(moved))

    def _captured(self, path: str, call: Call) -> tuple[Capture, list[Site]] | None:
        owner = self.root.get_submodule(path)
        key = self.footprints.of(path), _signature(call)
        if key not in self.known:
            self.known[key] = _alone(self.root, owner, call)
        found = self.known[key]
        if found is None or found[0].root is owner:
            return found
        if "forward" in owner.__dict__ or not can_move(found[0]):
            return _alone(self.root, owner, call)
        return moved_capture(found[0], owner, found[1])


def _lifted(members: dict[str, list[Replacement]]) -> dict[str, list[Replacement]]:
    """Each site at the innermost module that also makes the masks which were proved: elsewhere they are only tensors."""
    result: dict[str, list[Replacement]] = {}
    for path, taken in members.items():
        for one in taken:
            made = [module_path(node) for node in _makers(one.site)]
            result.setdefault(_common([path, *made]), []).append(one)
    return result


def _makers(site: Site) -> list[torch.fx.Node]:
    """The operations that compute the masks a predicate stands for."""
    if site.mask.predicate in (None, sympy.true):
        return []
    nodes = [node for node in ancestors(site.mask_sources) if isinstance(value_of(node), torch.Tensor)]
    return [node for node in nodes if node.op not in ("placeholder", "get_attr")]


def _common(paths: list[str]) -> str:
    steps = zip(*(module_of_site(path).split(".") for path in paths), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def _alone(root: nn.Module, owner: nn.Module, call: Call) -> tuple[Capture, list[Site]] | None:
    """A module's own graph and its sites; None where the graph would not be the module's in every call.

    A number among the arguments may be a length, and a branch on values an accident of the example, which the graph would
    freeze; a forward already bound to the instance is somebody else's; a constant that is a parameter of another module would
    not follow it.
    """
    leaves = pytree.tree_leaves(call)
    if "forward" in owner.__dict__ or any(not isinstance(x, torch.Tensor | bool | str | None) for x in leaves):
        return None
    try:
        with own_hooks_lifted(owner):
            captured = capture(owner, call)
    except CaptureError:
        return None
    if (
        captured.guards.values is not None
        or len(captured.inputs) != sum(isinstance(x, torch.Tensor) for x in leaves)
        or _borrows(captured, root)
    ):
        return None
    return captured, recognise(captured, Report()).sites


def _same(site: Site, taken: Replacement) -> bool:
    """True when the site is admitted, becomes the same operator, and keeps the same sizes symbolic."""
    if taken.rewrite.admits(site) is not None or taken.rewrite.operator(site) != taken.call:
        return False
    return _words(site) == _words(taken.site)


def _words(site: Site) -> Any:
    sizes = [
        fixed_size(operand.shape[axis]) is None
        for operand in (site.q, site.k)
        for group in operand.axes[:2]
        for axis in group
    ]
    biases = [(bias.role, bias.factor) for bias in site.biases]
    others = site.gain is None, site.sinks is None if not isinstance(site.sinks, float) else site.sinks
    return sizes, biases, len(site.mask.tables), others, site.phase, site.folded


def _joined(owner: str, path: str) -> str:
    return f"{owner}.{path}" if path and path[0] not in "#@" else owner + path


def _borrows(captured: Capture, root: nn.Module) -> bool:
    held = _storages((*root.parameters(), *root.buffers())) - {0}
    constants = [x for name, x in captured.graph.named_buffers() if name.startswith(f"{CONSTANTS}.")]
    return not held.isdisjoint(_storages(constants))


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Addresses of the memory of dense tensors; sparse ones have none, and no graph reads them."""
    return {x.untyped_storage().data_ptr() for x in tensors if x.layout == torch.strided}
