"""One softmax attention found in a graph: everything a rewrite may need to know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.mask import Mask
from subquad.ir.provenance import Provenance

CanonicalAxes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""For (batch, time, head, dim): the axes that hold it, outermost first; none when it is absent (size one)."""


@dataclass(frozen=True)
class View:
    """One step of laying a tensor out: "squeeze" (axis), "unsqueeze" (axis), "expand" (axis, size), "permute" (order),
    "flatten" (first, last) or "unflatten" (axis, sizes); a size is an int or a SymInt of the capture.
    """

    name: str
    arguments: tuple[Any, ...]


Packed = tuple[int, tuple[Any, ...]]
"""An axis and the sizes it is unflattened to, outermost first."""


def unpacked_shape(shape: tuple[Any, ...], packed: tuple[Packed, ...]) -> tuple[Any, ...]:
    """The shape behind the unpacking of some of its axes."""
    sizes = dict(packed)
    return tuple(size for axis, held in enumerate(shape) for size in sizes.get(axis, (held,)))


@dataclass(frozen=True)
class Operand:
    """A q, k, v or output tensor, with the order of its axes.

    node: the graph value before any repetition of heads.  axes: for canonical order (batch, time, head, dim) the axes of
    `node` that hold it; further axes have size one.  packed: axes of `node` that count several of these together; `axes`
    then number the axes behind their unpacking.
    """

    node: torch.fx.Node
    axes: CanonicalAxes
    packed: tuple[Packed, ...] = ()

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes of the axes that `axes` numbers."""
        return unpacked_shape(shape_of(self.node) or (), self.packed)


@dataclass(frozen=True)
class ScoreTensor:
    """A tensor over the scores: `views` lay `node` out so that it broadcasts to [B, H, Tq, Tk]."""

    node: torch.fx.Node
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class Gain(ScoreTensor):
    """A tensor over the scores, the same for all keys, that multiplies or divides q·k."""

    divides: bool = False


@dataclass(frozen=True)
class Bias(ScoreTensor):
    """A tensor over the scores that acts after scale and softcap.

    role: "add" (factor times the tensor is added), "keep" (a boolean that hides a key where it is False), "hide" (one that
    hides a key where it is True) or "low" (a number that hides a key where it is at or below -1e30).  fill: what "keep" and
    "hide" add to the scores of a hidden key.
    """

    factor: float = 1.0
    role: str = "add"
    fill: float = float("-inf")


@dataclass(frozen=True)
class Site:
    """One softmax attention.

    path: module path, with the call suffix when a module is called more than once.  origin: "sdpa" | "softmax".
    phase: "full" (q and k have the same length: prefill or training) | "decode" | "cross".
    q, k, v: operands, GQA repetition peeled off.  out: the node that holds the result, in `out_axes` order (batch, time,
    head, dim).  scale multiplies q·k, `folded` of it taken out of q and k;
    gain, a tensor that does not depend on the key, multiplies it too; softcap c means c·tanh(s/c) after them.  biases are
    added then, the mask applied last.  heads, kv_heads, head_dim, value_dim: static sizes.  sinks: one more logit without
    a value per head or per row, a tensor over the scores, or one number for all.  absorbed: interior nodes.  mask_sources: the
    tensors that the mask was read from.  packed: axes of the result that count batch and heads together; out_axes then
    number the axes behind their unpacking.
    provenance: what lies behind q, k and v, in nodes of the graph that the site was found in; None when it was not looked for.
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
    gain: Gain | None = None
    sinks: ScoreTensor | float | None = None
    dropout: float = 0.0
    folded: float = 1.0
    absorbed: tuple[torch.fx.Node, ...] = field(default=(), repr=False)
    mask_sources: tuple[torch.fx.Node, ...] = field(default=(), repr=False)
    packed: tuple[Packed, ...] = ()
    provenance: Provenance | None = field(default=None, repr=False)
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
            "gain": self.gain is not None,
            "sinks": self.sinks is not None,
            "dropout": self.dropout,
            "provenance": None if self.provenance is None else self.provenance.json(),
            "evidence": [*self.evidence, *self.mask.evidence],
            "source": self.source,
        }
