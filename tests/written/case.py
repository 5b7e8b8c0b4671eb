"""What a written model is, how it is called, and what recognition must find in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

DIALECTS = ("export", "verified", "dynamo", "core")
"""torch.export's graph; the same with the verification ladder; the graph Dynamo gives a backend; an exported program
decomposed to core ATen."""


@dataclass(frozen=True)
class Case:
    """One written model.

    build: makes it, in eval mode.  inputs: positional arguments for (batch, time).  sites: for each attention, in graph
    order, the words of its site that must hold.  refused: for each refusal a part of its reason, in any order; an empty
    string for any reason.  dialects: where it is tried.  quick: the dialects that every run of the
    tests tries.  sizes: captured with the first, compared at both.  dtype: of parameters and inputs.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple[Any, ...]]
    sites: tuple[dict[str, Any], ...] = ({},)
    refused: tuple[str, ...] = ()
    dialects: tuple[str, ...] = DIALECTS
    quick: tuple[str, ...] = ("export",)
    sizes: tuple[tuple[int, int], ...] = ((2, 9), (3, 14))
    dtype: torch.dtype = torch.float32

    def model(self) -> nn.Module:
        """A fresh instance with fixed random weights."""
        torch.manual_seed(0)
        return self.build().eval().to(self.dtype)

    def call(self, size: int = 0) -> tuple[Any, ...]:
        """Arguments of one size, the same at every call."""
        torch.manual_seed(100 + size)
        batch, time = self.sizes[size]
        return tuple(
            x.to(self.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in self.inputs(batch, time)
        )


def hidden(width: int = 32) -> Callable[[int, int], tuple[torch.Tensor]]:
    """Arguments of a layer: hidden states [B, T, width]."""
    return lambda batch, time: (torch.randn(batch, time, width),)


def token_ids(vocabulary: int = 50) -> Callable[[int, int], tuple[torch.Tensor]]:
    """Arguments of a language model: ids [B, T]."""
    return lambda batch, time: (torch.randint(0, vocabulary, (batch, time)),)
