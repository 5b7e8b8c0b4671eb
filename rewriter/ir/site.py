"""One softmax attention found in a graph: everything a rewrite may need to know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.fx

from subquad.ir.mask import Mask

CanonicalAxes = tuple[int | None, int | None, int | None, int | None]
"""For (batch, time, head, dim): the axis that holds it, None when it is absent."""


@dataclass(frozen=True)
class Operand:
    """A q, k, v or output tensor, with the order of its axes.

    node: the graph value before any repetition of heads.  axes: for canonical order (batch, time, head, dim) the axis of
    `node` that holds it, or None when it is absent (size one).
    """

    node: torch.fx.Node
    axes: CanonicalAxes


@dataclass(frozen=True)
class Bias:
    """A tensor over the scores, broadcastable to [B, H, Tq, Tk], that acts after scale and softcap.

    role: "add" (factor times the tensor is added), "keep" (a boolean that hides a key where it is False) or "hide" (one
    that hides a key where it is True).
    """

    node: torch.fx.Node
    factor: float = 1.0
    role: str = "add"


@dataclass(frozen=True)
class Site:
    """One softmax attention.

    path: module path, with the call suffix when a module is called more than once.  origin: "sdpa" | "softmax".
    phase: "full" (q and k have the same length: prefill or training) | "decode" | "cross".
    q, k, v: operands, GQA repetition peeled off.  out: the node that holds the result, in `out_axes` order (batch, time,
    head, dim).  scale multiplies q·k, `folded` of it taken out of q and k;
    softcap c means c·tanh(s/c) after it.  biases are added then, the mask applied last.
    heads, kv_heads, head_dim, value_dim: static sizes.  sinks: logit node [H] or None.  absorbed: interior nodes.
    evidence: sentences saying how each part was read.  source: file:line of the user's code.
    """

    path: str
    origin: str
    phase: str
    q: Operand
    k: Operand
    v: Operand
    out: torch.fx.Node
    out_axes: CanonicalAxes
    scale: float
    mask: Mask
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    softcap: float | None = None
    biases: tuple[Bias, ...] = ()
    sinks: torch.fx.Node | None = None
    dropout: float = 0.0
    folded: float = 1.0
    absorbed: tuple[torch.fx.Node, ...] = field(default=(), repr=False)
    evidence: tuple[str, ...] = ()
    source: str = ""

    def json(self) -> dict[str, Any]:
        """The public words of a site."""
        return {
            "path": self.path,
            "origin": self.origin,
            "phase": self.phase,
            "mask": self.mask.json(),
            "scale": self.scale,
            "softcap": self.softcap,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "biases": len(self.biases),
            "sinks": self.sinks is not None,
            "dropout": self.dropout,
            "evidence": [*self.evidence, *self.mask.evidence],
            "source": self.source,
        }
