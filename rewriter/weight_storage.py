"""Keep a decoder's weights in one storage, in the order they are read, projections of one input side by side."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 8 << 20
"""Weights of fewer bytes than this are not worth large pages."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Packing:
    """Where the weights lie.

    parts: names in the order of first use; the tensors of one part lie side by side.  groups: parts that are also read as
    one tensor, concatenated along the first axis, with the name of that tensor.
    """

    parts: tuple[tuple[str, ...], ...]
    groups: dict[tuple[str, ...], str] = field(default_factory=dict)


class TensorForm(NamedTuple):
    """What a tensor is like without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device = CPU


def with_groups(forms: Mapping[str, TensorForm], packing: Packing) -> dict[str, TensorForm]:
    """The forms with those of the packed tensors added."""
    packed = {}
    for part, name in packing.groups.items():
        first = forms[part[0]]
        packed[name] = first._replace(shape=(sum(forms[n].shape[0] for n in part), *first.shape[1:]))
    return dict(forms) | packed


def form_of(tensor: Tensor) -> TensorForm:
    """The form of a tensor."""
    return TensorForm(tensor.dtype, tuple(tensor.shape), tensor.device)


def room(forms: Mapping[str, TensorForm], packing: Packing) -> dict[str, Tensor]:
    """Uninitialised tensors for every name of the packing and for its packed tensors, as views of one storage per dtype.

    On CPU the storage is advised to large pages: reading it is then about a quarter faster (measured).
    """
    views: dict[str, Tensor] = {}
    heads = [forms[part[0]] for part in packing.parts]
    for dtype, device in dict.fromkeys((head.dtype, head.device) for head in heads):
        parts = [
            p for p, head in zip(packing.parts, heads, strict=True) if (head.dtype, head.device) == (dtype, device)
        ]
        grain = 64 // dtype.itemsize
        sizes = [sum(math.prod(forms[name].shape) for name in part) for part in parts]
        storage = _storage(sum(-(-size // grain) * grain for size in sizes), dtype, device)
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            at = start
            for name in part:
                shape = forms[name].shape
                views[name] = storage[at : at + math.prod(shape)].view(shape)
                at += math.prod(shape)
            if part in packing.groups:
                views[packing.groups[part]] = storage[start:at].view(-1, *forms[part[0]].shape[1:])
            start += -(-size // grain) * grain
    return views


def pack(weights: Mapping[str, Tensor], packing: Packing) -> dict[str, Tensor]:
    """Move the weights of a packing into one storage and return all weights with the packed tensors added.

    Each parameter keeps its object, shape and values; its data becomes a view of the storage, so there is one copy of the
    weights, and what it was before is freed before the next one moves.
    """
    views = room({name: form_of(weights[name]) for part in packing.parts for name in part}, packing)
    with torch.no_grad():
        for part in packing.parts:
            for name in part:
                views[name].copy_(weights[name])
                weights[name].data = views[name]
    return dict(weights) | {name: views[name] for name in packing.groups.values()}


def _storage(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = count * dtype.itemsize
    if device.type != "cpu" or size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device=device)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=dtype, count=count)
