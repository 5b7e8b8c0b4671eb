"""Where the operands of an attention come from: projections, q/k norms, rotary embedding, positions, the layer input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch.fx

Node = torch.fx.Node
BATCH, TIME = sympy.symbols("b t", integer=True, nonnegative=True)
"""Indices in which a position is expressed: the row of the batch, and the place along the operand's own time axis."""


@dataclass(frozen=True)
class Adapter:
    """A low-rank term beside a weight, as LoRA adds it: scale · (x · downᵀ) · upᵀ.  down [r, in], up [out, r]."""

    down: Node
    up: Node
    scale: float


@dataclass(frozen=True)
class Projection:
    """An operand, or a part of its width, as features of x · weightᵀ + bias (+ adapters).

    node: the value that holds all features.  x: its input [..., in].  weight: the tensor as it is held, [out, in], or
    [in, out] when `transposed` (GPT-2's Conv1D).  rows: for each head, then each place of the width, the feature that is
    read: a fused projection is read in part.  heads: how many heads `rows` counts.  axes: what runs along each axis of x
    but the last: "b", "t", "bt" for both flattened, "" for an axis of size one.
    """

    node: Node
    x: Node
    weight: Node
    transposed: bool
    bias: Node | None
    rows: Sequence[int]
    heads: int
    out_features: int
    axes: tuple[str, ...]
    adapters: tuple[Adapter, ...] = ()

    @property
    def fused(self) -> bool:
        """True when the weight has features that this operand does not read."""
        return len(self.rows) < self.out_features

    def words(self) -> str:
        """One phrase for a report."""
        name = re.sub(r"^l_(self_)?(modules_)?|_parameters_\w+$", "", str(self.weight.target)).replace("_modules_", ".")
        name = name.removesuffix(".weight")
        part = f", {len(self.rows)} of its {self.out_features} features" if self.fused else ""
        return f"{name}{part}" + (" with adapters" if self.adapters else "")


@dataclass(frozen=True)
class Norm:
    """A normalisation of q or k.  name: "rms" | "layer" | "l2".

    node: the result.  x: what it normalises, over its last axis, of `width` elements (one head's, or all heads').
    weight, bias: held tensors [width], or [heads, width] of a norm per head; None without.  `offset` is added to the
    weight (1 for Gemma).  after_rotary: the order.
    """

    name: str
    node: Node
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float
    width: int
    offset: float = 0.0
    after_rotary: bool = False


@dataclass(frozen=True)
class Table:
    """A tensor of cosines or sines as a rotary embedding reads it.

    axes: for each axis of `node` what runs along it: "b", "t", "d", or "" for an axis of size one.  columns: the place on
    the "d" axis for each place of the rotated width.  part: of complex numbers, 0 the real part and 1 the imaginary one.
    """

    node: Node
    axes: tuple[str, ...]
    columns: tuple[int, ...]
    part: int | None = None


@dataclass(frozen=True)
class Position:
    """The number whose multiples are the angles.

    node: the tensor that holds it, None when rows of a table are taken in order.  expression: in BATCH and TIME.
    frequencies: one per place of the rotated width, None when they are computed from an input.  base: the θ with
    frequencies θ^(-2j/width), None when they are not of that form.
    """

    node: Node | None
    expression: sympy.Basic
    frequencies: tuple[float, ...] | None
    base: float | None


@dataclass(frozen=True)
class Rotary:
    """out[d] = pre[first[d]]·cos[d] + signs[d]·pre[second[d]]·sin[d] for every place d of `width`.

    style: "half" (d pairs with d ± width/2), "interleaved" (2j with 2j+1), "deinterleaved" (pairs 2j, 2j+1 written to j and
    j + width/2) or "other".  pre: the tensor before the rotation, its axes in canonical order; heads repeat when it has
    none.  scale: the length of (cos, sin), already in the tables (YaRN's attention factor).  position: None when the angle
    could not be proved to be one position times fixed frequencies; `why` then says so.
    """

    style: str
    width: int
    first: tuple[int, ...]
    second: tuple[int, ...]
    signs: tuple[int, ...]
    cos: Table
    sin: Table
    pre: Node
    pre_axes: tuple[tuple[int, ...], ...]
    position: Position | None
    scale: float = 1.0
    why: str = ""


@dataclass(frozen=True)
class Part:
    """Places start … start + width of an operand's head, all of one origin; `why` says what is missing and for what reason.

    factor: a number that multiplies the projection; with a norm it is one.
    """

    start: int
    width: int
    rotary: Rotary | None = None
    norm: Norm | None = None
    projection: Projection | None = None
    factor: float = 1.0
    why: str = ""


@dataclass(frozen=True)
class Origin:
    """Where q, k or v comes from: parts that are concatenated along the head's width, one for most models.

    Multi-head latent attention has two (without and with rotation), a partial rotary embedding too.
    """

    parts: tuple[Part, ...]
    why: str = ""

    @property
    def rotary(self) -> Rotary | None:
        """The one rotation among the parts; None when there is none, or when several differ."""
        found = [part.rotary for part in self.parts if part.rotary is not None]
        return found[0] if len(found) == 1 else None

    @property
    def norm(self) -> Norm | None:
        """The norm that all parts share."""
        found = {part.norm.node if part.norm else None for part in self.parts}
        return self.parts[0].norm if len(found) == 1 and self.parts else None

    @property
    def projection(self) -> Projection | None:
        """The projection that all parts read; its rows are those of the first part alone when there are several."""
        found = {part.projection.node if part.projection else None for part in self.parts}
        return self.parts[0].projection if len(found) == 1 and self.parts else None

    def json(self) -> dict[str, Any]:
        """Plain data: what was found of each part."""
        return {"parts": [_part_json(part) for part in self.parts], "why": self.why}


@dataclass(frozen=True)
class Output:
    """What is done to the rows of a site's output before anything else reads them: norm, then times act(gate), act "sigmoid" or
    "silu" and the gate a tensor of the output's shape. None for what is not there, or not proved.
    """

    norm: Norm | None = None
    act: Literal["sigmoid", "silu"] | None = None


@dataclass(frozen=True)
class Provenance:
    """What lies behind the operands of a site, and behind its output, each piece proved from the graph or None.

    layer_input: the tensor that all projections read; None when they read different ones, or are not all found; `why` says.
    """

    q: Origin
    k: Origin
    v: Origin
    layer_input: Node | None
    why: str = ""
    output: Output = Output()

    def json(self) -> dict[str, Any]:
        """The public words of a provenance."""
        return {
            "q": self.q.json(),
            "k": self.k.json(),
            "v": self.v.json(),
            "layer_input": None if self.layer_input is None else self.layer_input.name,
            "why": self.why,
        }


def _part_json(part: Part) -> dict[str, Any]:
    rotary, norm, projection = part.rotary, part.norm, part.projection
    position = rotary.position if rotary else None
    return {
        "start": part.start,
        "width": part.width,
        "rotary": None if rotary is None else {
            "style": rotary.style, "width": rotary.width, "scale": rotary.scale, "why": rotary.why,
            "position": None if position is None else str(position.expression),
            "base": None if position is None else position.base,
        },
        "norm": None if norm is None else {
            "name": norm.name, "width": norm.width, "eps": norm.eps, "after_rotary": norm.after_rotary,
        },
        "projection": None if projection is None else {
            "weight": projection.words(), "features": len(projection.rows), "of": projection.out_features,
            "adapters": len(projection.adapters),
        },
        "factor": part.factor,
        "why": part.why,
    }  # fmt: skip
