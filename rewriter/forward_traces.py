"""What a call of a module leaves behind beside its result: draws, buffers and attributes that changed; found and undone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def traceless(root: nn.Module) -> Iterator[list[str]]:
    """A block whose calls of the module leave nothing behind; the list says afterwards what they would have.

    "random": numbers drawn from torch's or Python's generators; "buffers"; "attribute `NAME`": a number, a text, or the
    length of a list.  Other objects that a forward changes are not seen.
    """
    seen: list[str] = []
    buffers = {name: (tensor, tensor.detach().clone()) for name, tensor in root.named_buffers()}
    told, dice = _attributes(root), random.getstate()
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        try:
            yield seen
        finally:
            if not torch.equal(state, torch.get_rng_state()) or dice != random.getstate():
                seen.append("random")
                random.setstate(dice)
            for name, (tensor, before) in buffers.items():
                seen += _put_back(root, name, tensor, before)
            seen += [f"attribute `{name}`" for name in _restored(root, told)]


def _put_back(root: nn.Module, name: str, tensor: Tensor, before: Tensor) -> list[str]:
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    replaced = owner._buffers.get(leaf) is not tensor
    if replaced:
        owner._buffers[leaf] = tensor
    if torch.equal(tensor, before) or (tensor.is_floating_point() and torch.equal(tensor.isnan(), before.isnan())
                                       and torch.equal(tensor.nan_to_num(), before.nan_to_num())):  # fmt: skip
        return ["buffers"] if replaced else []
    with torch.no_grad():
        tensor.copy_(before)
    return ["buffers"]


def _attributes(root: nn.Module) -> dict[tuple[str, str], Any]:
    """Numbers, texts and lengths of lists among the attributes of all modules, which a call might count up."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in root.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, (bool, int, float, str)):
                found[path, name] = value
            elif isinstance(value, list):
                found[path, name] = len(value)
    return found


def _restored(root: nn.Module, told: dict[tuple[str, str], Any]) -> list[str]:
    """The attributes that are not what they were; they are again."""
    changed = [key for key, value in _attributes(root).items() if key in told and told[key] != value]
    for path, name in changed:
        module = root.get_submodule(path)
        value = module.__dict__[name]
        if isinstance(value, list):
            del value[told[path, name] :]
        else:
            module.__dict__[name] = told[path, name]
    return [f"{path}.{name}".lstrip(".") for path, name in changed]


def hooked(root: nn.Module) -> str | None:
    """The first module below the root with a forward hook other than torch's own."""
    for name, module in root.named_modules():
        hooks = [] if module is root else [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.") for hook in hooks):
            return name
    return None
