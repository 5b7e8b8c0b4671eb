"""One site with the rewrite that takes it, and the graph in which operators stand at the sites."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from subquad.captured import Capture
from subquad.emission import PARAMETERS, emit_site
from subquad.graph_copy import carry_site, copy_capture
from subquad.ir.graph import attribute, hang
from subquad.ir.rewrite import Rewrite, SiteOperator
from subquad.ir.site import Site
from subquad.passes.canonicalize.tidy import tidy


@dataclass(frozen=True)
class Replacement:
    """One site with the rewrite that takes it, the operator it becomes, and where its learned tensors live.

    prefix: dotted name, from the module the site was captured in, of the submodule that holds them.
    """

    site: Site
    rewrite: Rewrite
    call: SiteOperator
    prefix: str


def module_of_site(path: str) -> str:
    """The path of the module that a site's path names, without the suffixes of repeated calls and sites."""
    return path.partition("#")[0].partition("@")[0]


def replacement(root: nn.Module, site: Site, rewrite: Rewrite) -> Replacement:
    """The replacement of a site; the tensors its rewrite learns become a submodule of the site's module."""
    owner, number = module_of_site(site.path), site.path.partition("#")[2]
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


def learned_tensors(root: nn.Module, taken: Replacement) -> dict[str, torch.Tensor]:
    """The tensors that a replacement's operator learned, by name."""
    names = [name for names in taken.call.parameters.values() for name in names]
    return {name: attribute(root, f"{taken.prefix}.{name}") for name in names}


def rewritten_capture(capture: Capture, replacements: tuple[Replacement, ...]) -> Capture:
    """A copy of the capture in which every replacement's site is one operator call."""
    applied, mapping = copy_capture(capture)
    for taken in replacements:
        learned = learned_tensors(capture.root, taken)
        for name, value in learned.items():
            hang(applied.graph, f"{taken.prefix}.{name}", value)
        emit_site(applied.graph, carry_site(taken.site, mapping), taken.call, learned, taken.prefix)
    tidy(applied.graph)
    return applied
