"""Walk back from the operands of a site: rotary embedding, q/k norms, projections, and the layer input they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.fx

from subquad.ir.graph import attribute, dtype_of, shape_of, value_of
from subquad.ir.provenance import Norm, Origin, Part, Projection, Provenance
from subquad.ir.site import CanonicalAxes, Operand
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.projection import projection_of, read_affine
from subquad.passes.recognize.projection_norm import read_norm
from subquad.passes.recognize.provenance_index import SIMPLE, Index
from subquad.passes.recognize.provenance_terms import Expansion, Read, Term, word
from subquad.passes.recognize.rotary import read_rotary
from subquad.passes.recognize.rotary_angle import AngleReader, with_position
from subquad.passes.recognize.weighting import SHAPE_ONLY

Node = torch.fx.Node
DEPTH = 6
"""Norms, rotations and latents between an operand and its projection."""


@dataclass(frozen=True)
class _Axes:
    """The tokens of an operand: their sizes and roles; heads outermost first."""

    sizes: dict[str, Any]
    roles: dict[str, str]


class ProvenanceReader:
    """Reads the provenance of sites of one graph; what layers share is read once.

    tensors: placeholders whose content is known and fixed, as Dynamo makes of parameters.
    """

    def __init__(
        self, module: torch.fx.GraphModule, algebra: MaskAlgebra, tensors: Mapping[Node, torch.Tensor] | None = None
    ):
        self.module, self.algebra, self.tensors = module, algebra, dict(tensors or {})
        self._signals: set[Node] | None = None
        self._norms: dict[Node, Norm | None] = {}
        self._ends: dict[Node, bool] = {}
        self._angles: dict[Any, Any] = {}

    def read(self, q: Operand, k: Operand, v: Operand) -> Provenance:
        """The provenance of a site with these operands."""
        origins = self.origin(q), self.origin(k), self.origin(v)
        shared, why = self._shared_input(origins)
        return Provenance(*origins, shared, why)

    def origin(self, operand: Operand) -> Origin:
        """Where one operand comes from."""
        shape = shape_of(operand.node) or ()
        start = None if operand.packed else _start(operand.axes, shape)
        if start is None:
            return Origin((), "its width is not one axis of a fixed size")
        indices, axes = start
        width = len(indices[0].values)
        parts = self._parts(Read(operand.node, indices), np.arange(width), axes, 0)
        return Origin(tuple(_joined(parts)))

    def _parts(self, read: Read, lanes: np.ndarray, axes: _Axes, depth: int) -> list[Part]:
        """The parts of consecutive lanes, each of one origin."""
        begin = int(lanes[0])
        if depth > DEPTH:
            return [Part(begin, len(lanes), why="the walk back is too long")]
        expansion = Expansion(self.is_signal, self._is_end, axes.sizes)
        leaves = expansion.leaves(Term(read, lanes, trail=(read,)))
        found: list[Part] = []
        for start, width, terms in _runs(leaves, begin, len(lanes)):
            if len(terms) == 1 and not terms[0].factors:
                found.extend(self._plain(terms[0], axes, depth))
            else:
                found.extend(self._turned(terms, start, width, axes, depth))
        return found

    def _plain(self, term: Term, axes: _Axes, depth: int) -> list[Part]:
        """What is behind the end of a walk: a norm and what it normalises, a projection, or nothing known."""
        node, start, width = term.read.node, int(term.lanes[0]), len(term.lanes)
        norm, factor = self.norm(node), term.sign
        if norm is None:
            found = projection_of(node, term.read.indices, axes.sizes, axes.roles, self.held)
            if isinstance(found, Projection):
                return [Part(start, width, projection=found, factor=factor)]
            return [Part(start, width, why=found)]
        if factor != 1.0:
            return [Part(start, width, why="a normalised tensor is multiplied by a number")]
        inner = self._parts(Read(norm.x, term.read.indices), term.lanes, axes, depth + 1)
        if any(part.norm is not None or part.factor != 1.0 for part in inner):
            return [Part(start, width, why="it is scaled or normalised before its norm")]
        return [replace(part, norm=replace(norm, after_rotary=part.rotary is not None)) for part in inner]

    def _turned(self, terms: list[Term], start: int, width: int, axes: _Axes, depth: int) -> list[Part]:
        found = read_rotary(terms, start, width, axes.sizes, axes.roles)
        if isinstance(found, str):
            return [Part(start, width, why=found)]
        rotary, cos, sin = found
        key = (cos.node, sin.node, rotary.cos, rotary.sin)
        if key not in self._angles:
            self._angles[key] = AngleReader(self.algebra, axes.sizes, axes.roles).position(cos, sin)
        rotary = with_position(rotary, self._angles[key])
        before = next(r for r in terms[0].trail if r.node is rotary.pre)
        along = rotary.pre_axes[3][0]
        indices = tuple(
            Index(np.arange(width)) if n == along else Index(np.zeros(width, dtype=np.int64), index.terms)
            for n, index in enumerate(before.indices)
        )
        inner = self._parts(Read(rotary.pre, indices), np.arange(start, start + width), axes, depth + 1)
        if len(inner) != 1 or inner[0].rotary is not None:
            return [Part(start, width, rotary, why="what is turned has several origins")]
        return [replace(inner[0], rotary=rotary)]

    def norm(self, node: Node) -> Norm | None:
        """The norm that a node is the result of."""
        if node not in self._norms:
            self._norms[node] = read_norm(node, self.held)
        return self._norms[node]

    def _is_end(self, node: Node) -> bool:
        if node not in self._ends:
            self._ends[node] = self.norm(node) is not None or read_affine(node, self.held) is not None
        return self._ends[node]

    def held(self, value: Any) -> Node | None:
        """The parameter or buffer that an argument is, behind views and casts; None when it is computed."""
        while isinstance(value, Node) and kind(value) in SIMPLE | {"view"}:
            value = arguments(value)["x"]
        if not isinstance(value, Node):
            return None
        return value if value.op == "get_attr" or value in self.tensors or _is_parameter(value) else None

    def is_signal(self, node: Node) -> bool:
        """True for a tensor that depends on activations or trained parameters, not on positions and constants alone."""
        if self._signals is None:
            self._signals = self._find_signals()
        return node in self._signals

    def _find_signals(self) -> set[Node]:
        found: set[Node] = set()
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(self.module, str(node.target))
                active = isinstance(value, torch.nn.Parameter)
            elif node in self.tensors:
                active = isinstance(self.tensors[node], torch.nn.Parameter)
            elif node.op == "placeholder":
                dtype = dtype_of(node)
                active = dtype is not None and dtype.is_floating_point
            else:
                sized = kind(node) in SHAPE_ONLY or isinstance(value_of(node), int | torch.SymInt)
                active = not sized and any(n in found for n in node.all_input_nodes)
            if active:
                found.add(node)
        return found

    def _shared_input(self, origins: tuple[Origin, Origin, Origin]) -> tuple[Node | None, str]:
        """The tensor that all projections read, directly or through a low-rank latent."""
        found: list[Projection] = []
        for name, origin in zip("qkv", origins, strict=True):
            if not origin.parts:
                return None, f"{name}: {origin.why}"
            for part in origin.parts:
                if part.projection is None:
                    return None, f"{name}: {part.why}"
                found.append(part.projection)
        inputs = {_unlaid(projection.x) for projection in found}
        if len(inputs) == 1:
            return inputs.pop(), ""
        chains = [self._inputs(projection) for projection in found]
        for candidate in chains[0]:
            if all(candidate in chain for chain in chains):
                return candidate, ""
        return None, "queries and keys are projections of different tensors"

    def _inputs(self, projection: Projection) -> list[Node]:
        """The input of a projection, and of the projections and norms that it is a latent of."""
        found: list[Node] = []
        here: Any = projection.x
        for _ in range(DEPTH):
            here = _unlaid(here)
            found.append(here)
            latent = self.norm(here)
            if latent is not None:
                here = _unlaid(latent.x)
            while word(here) in ("slice", "narrow", "getitem", "split", "split_with_sizes", "chunk"):
                here = _unlaid(here.args[0])
            affine = read_affine(here, self.held)
            if affine is None:
                return found
            here = affine.x
        return found


def _is_parameter(node: Node) -> bool:
    """True for a parameter that Dynamo lifted to an input."""
    return node.op == "placeholder" and isinstance(value_of(node), torch.nn.Parameter)


def _unlaid(node: Any) -> Any:
    while kind(node) in ("view", "flatten", "unflatten", "contiguous", "cast", "dropout"):
        node = arguments(node)["x"]
    return node


def _start(axes: CanonicalAxes, shape: tuple[Any, ...]) -> tuple[tuple[Index, ...], _Axes] | None:
    """Every element of one head, one lane each, for symbolic batch, time and head."""
    if len(axes[3]) != 1 or not isinstance(shape[axes[3][0]], int):
        return None
    width = shape[axes[3][0]]
    zeros = np.zeros(width, dtype=np.int64)
    indices = [Index(zeros)] * len(shape)
    indices[axes[3][0]] = Index(np.arange(width))
    sizes: dict[str, Any] = {}
    roles: dict[str, str] = {}
    for role, places in zip("bth", axes[:3], strict=True):
        for n, place in enumerate(places):
            token = f"{role}{n}"
            size = shape[place]
            indices[place] = Index(zeros, ((token, 1),))
            sizes[token], roles[token] = size if isinstance(size, int) else size.node.expr, role
    if not all(isinstance(size, int) for token, size in sizes.items() if roles[token] == "h"):
        return None
    return tuple(indices), _Axes(sizes, roles)


def _runs(leaves: list[Term], begin: int, width: int) -> list[tuple[int, int, list[Term]]]:
    """Consecutive lanes whose terms end at the same nodes in the same way: (start, width, their terms)."""
    of_lane: list[list[Any]] = [[] for _ in range(width)]
    for leaf in leaves:
        key = (id(leaf.read.node), len(leaf.factors))
        for lane in leaf.lanes.tolist():
            of_lane[lane - begin].append(key)
    found: list[tuple[int, int, list[Term]]] = []
    lane = 0
    while lane < width:
        here, end = sorted(of_lane[lane]), lane
        while end < width and sorted(of_lane[end]) == here:
            end += 1
        inside: list[Term] = []
        for leaf in leaves:
            kept = np.flatnonzero((leaf.lanes >= begin + lane) & (leaf.lanes < begin + end))
            if kept.size:
                inside.append(leaf if kept.size == len(leaf.lanes) else leaf.take(kept))
        found.append((begin + lane, end - lane, _merged_plain(inside)))
        lane = end
    return found


def _merged_plain(terms: list[Term]) -> list[Term]:
    """One term for plain terms of one node that were cut by concatenations and meet again."""
    if len(terms) < 2 or any(t.factors or t.sign != 1.0 for t in terms) or len({t.read.node for t in terms}) != 1:
        return terms
    lanes = np.concatenate([t.lanes for t in terms])
    if len(np.unique(lanes)) != len(lanes):
        return terms
    order = np.argsort(lanes)
    indices = []
    for parts in zip(*(t.read.indices for t in terms), strict=True):
        if any(p.terms != parts[0].terms for p in parts):
            return terms
        indices.append(Index(np.concatenate([p.values for p in parts])[order], parts[0].terms))
    read = Read(terms[0].read.node, tuple(indices))
    return [Term(read, lanes[order], trail=(read,))]


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbouring parts without rotation that read consecutive features of one projection are one part."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if last is not None and last.why and last.why == part.why and not (last.rotary or part.rotary):
            found[-1] = replace(last, width=last.width + part.width)
        else:
            found.append(part)
    return found
