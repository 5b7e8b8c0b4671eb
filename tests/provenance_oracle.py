"""Recompute q, k and v from what a provenance says of them, in float64, on the values the graph itself computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sympy
import torch
from torch import nn
from torch.export import Dim

from subquad.backend import _fixed
from subquad.capture import capture
from subquad.captured import Capture
from subquad.ir.provenance import BATCH, TIME, Norm, Part, Projection, Provenance, Rotary, Table
from subquad.ir.site import Operand, Site
from subquad.passes.canonicalize.functional import functional
from subquad.passes.recognize import provenance as reading
from subquad.passes.recognize.attention import find_attention
from subquad.passes.recognize.mask_algebra import MaskAlgebra

Values = dict[torch.fx.Node, Any]


class Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps every value."""

    def run_node(self, n: torch.fx.Node) -> Any:
        made = super().run_node(n)
        return made.clone() if isinstance(made, torch.Tensor) else made


def captured(model: nn.Module, inputs: Any, dialect: str) -> Capture:
    """The model's graph as export gives it, decomposed to core ATen, or as Dynamo hands it to a backend."""
    if dialect == "export":
        return capture(model, inputs)
    if dialect == "core":
        with torch.no_grad():
            args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
            sizes = {0: Dim.AUTO, 1: Dim.AUTO}
            dynamic = [sizes if isinstance(x, torch.Tensor) else None for x in (*args, *kwargs.values())]
            shapes: Any = dict(zip(kwargs, dynamic, strict=True)) if kwargs else tuple(dynamic)
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            return capture(program.run_decompositions())
    kept: list[Capture] = []
    torch._dynamo.reset()

    def backend(given: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        graph = functional(given)
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        known = _fixed(placeholders, examples)
        example = {n.name: x for n, x in zip(placeholders, examples, strict=True) if isinstance(x, torch.Tensor)}
        kept.append(Capture(graph, graph, tuple(n.name for n in placeholders), "torch", example, known_tensors=known))
        kept[-1].constants = dict(enumerate(x.node.hint if isinstance(x, torch.SymInt) else x for x in examples))
        return given.forward

    for tensor in inputs if isinstance(inputs, tuple) else inputs.values():
        if isinstance(tensor, torch.Tensor):
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(tensor, 1)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(*inputs) if isinstance(inputs, tuple) else compiled(**inputs)
    assert len(kept) == 1
    return kept[0]


def found(kept: Capture) -> tuple[list[Site], list[Provenance]]:
    """Every site with its provenance."""
    tensors = {n: kept.known_tensors[n.name] for n in kept.graph.graph.nodes if n.name in kept.known_tensors}
    sites, refusals = find_attention(kept.graph, tensors, kept.example)
    assert sites, refusals
    reader = reading.ProvenanceReader(kept.graph, MaskAlgebra(kept.graph, tensors), tensors)
    return sites, [reader.read(site.q, site.k, site.v) for site in sites]


def values_of(kept: Capture) -> Values:
    """The value of every node on the capture's own examples."""
    recorder = Recorder(kept.graph, garbage_collect_values=False)
    names = [n.name for n in kept.graph.graph.nodes if n.op == "placeholder"]
    given = list(kept.constants.values()) if kept.dialect == "torch" else [kept.example[name] for name in names]
    with torch.no_grad():
        recorder.run(*given)
    return recorder.env


def canonical(tensor: torch.Tensor, axes: Any) -> torch.Tensor:
    """[B, T, H, D], absent axes of size one."""
    order = [axis for group in axes for axis in group]
    rest = [n for n in range(tensor.dim()) if n not in order]
    sizes = [int(np.prod([tensor.shape[axis] for axis in group])) if group else 1 for group in axes]
    return tensor.permute(*order, *rest).reshape(sizes)


def assert_recomputed(values: Values, operand: Operand, origin: Any, tolerance: float = 1e-5) -> None:
    """Each part with a projection gives the operand's places when projected, normalised and turned again."""
    want = canonical(values[operand.node], operand.axes).double()
    assert sum(part.width for part in origin.parts) == want.shape[-1]
    for part in origin.parts:
        if part.rotary is not None:
            turned = turn(part.rotary, canonical(values[part.rotary.pre], part.rotary.pre_axes).double(), values)
            if part.norm is None or not part.norm.after_rotary:
                compare(turned, want[..., part.start : part.start + part.width], tolerance)
            if part.rotary.position is not None:
                assert_angles(part.rotary, values)
        if part.projection is not None:
            compare(
                recomputed(part, origin.parts, values, (want.shape[0], want.shape[1])),
                want[..., part.start : part.start + part.width],
                tolerance,
            )


def compare(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Equal in value; shapes may differ where an absent axis is broadcast."""
    torch.testing.assert_close(
        got.expand_as(want).contiguous(), want.contiguous(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def recomputed(part: Part, parts: tuple[Part, ...], values: Values, sizes: tuple[int, int]) -> torch.Tensor:
    """A part of an operand from its projection's input."""
    projection, norm, rotary = part.projection, part.norm, part.rotary
    assert projection is not None
    x = part.factor * project(projection, values, sizes)
    if norm is not None and norm.width == sum(p.width for p in parts) > part.width:
        head = torch.cat([project(p.projection, values, sizes) for p in parts if p.projection], -1)
        x, norm = normalise(norm, head, values)[..., part.start : part.start + part.width], None
    if norm is not None and norm.width != x.shape[-1]:
        full = normalise(norm, in_order(projection, affine(projection, values), sizes), values)
        x = full[..., list(projection.rows)].unflatten(-1, (projection.heads, -1))
        norm = None
    if norm is not None and not norm.after_rotary:
        x = normalise(norm, x, values)
    if rotary is not None:
        x = turn(rotary, x, values)
    if norm is not None and norm.after_rotary:
        x = normalise(norm, x, values)
    return x


def affine(projection: Projection, values: Values) -> torch.Tensor:
    """All features, [B, T, out]."""
    x, weight = values[projection.x].double(), values[projection.weight].double()
    y = x @ (weight if projection.transposed else weight.T)
    if projection.bias is not None:
        y = y + values[projection.bias].double()
    for adapter in projection.adapters:
        y = y + adapter.scale * (x @ values[adapter.down].double().T @ values[adapter.up].double().T)
    return y


def project(projection: Projection, values: Values, sizes: tuple[int, int]) -> torch.Tensor:
    """The features that are read, [B, T, heads, width]."""
    return in_order(projection, affine(projection, values), sizes)[..., list(projection.rows)].unflatten(
        -1, (projection.heads, -1)
    )


def in_order(projection: Projection, features: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """[B, T, features] of a result whose axes are the projection's."""
    if "bt" in projection.axes:
        return features.reshape(*sizes, features.shape[-1])
    where = [projection.axes.index(role) if role in projection.axes else None for role in "bt"]
    order = [n for n in where if n is not None]
    rest = [n for n in range(features.dim() - 1) if n not in order]
    moved = features.permute(*order, features.dim() - 1, *rest).flatten(len(order))
    shape = [1 if n is None else features.shape[n] for n in where]
    return moved.reshape(*shape, features.shape[-1])


def normalise(norm: Norm, x: torch.Tensor, values: Values) -> torch.Tensor:
    """The norm over the last axis."""
    if norm.name == "layer":
        x = x - x.mean(-1, keepdim=True)
    size = x.square().sum(-1, keepdim=True) if norm.name == "l2" else x.square().mean(-1, keepdim=True)
    x = x / (size + norm.eps).sqrt()
    if norm.weight is not None:
        x = x * (values[norm.weight].double() + norm.offset)
    return x + values[norm.bias].double() if norm.bias is not None else x


def table(read: Table, values: Values) -> torch.Tensor:
    """[B or 1, T, 1, width]."""
    tensor = values[read.node]
    if read.part is not None:
        tensor = tensor.imag if read.part else tensor.real
    where = {role: n for n, role in enumerate(read.axes) if role}
    ordered = tensor.permute(*[where[r] for r in "btd" if r in where], *[n for n, r in enumerate(read.axes) if not r])
    ordered = ordered.reshape([tensor.shape[where[r]] if r in where else 1 for r in "btd"])
    return ordered[..., list(read.columns)].double()[:, :, None]


def turn(rotary: Rotary, pre: torch.Tensor, values: Values) -> torch.Tensor:
    """The rotation of [B, T, H, width]."""
    length = pre.shape[1]
    cos, sin = (table(read, values)[:, :length] for read in (rotary.cos, rotary.sin))
    signs = torch.tensor(rotary.signs, dtype=torch.float64)
    scale = 1.0
    return scale * (pre[..., list(rotary.first)] * cos + signs * pre[..., list(rotary.second)] * sin)


def assert_angles(rotary: Rotary, values: Values) -> None:
    """The tables are the cosines and sines of the proved position times the proved frequencies."""
    position = rotary.position
    assert position is not None
    assert position.frequencies is not None
    cos, sin = (table(read, values) for read in (rotary.cos, rotary.sin))
    if position.expression.free_symbols - {BATCH, TIME} or position.expression.atoms(sympy.core.function.AppliedUndef):
        return
    at = torch.tensor(
        [
            [float(position.expression.subs({BATCH: b, TIME: t})) for t in range(cos.shape[1])]
            for b in range(cos.shape[0])
        ],
        dtype=torch.float64,
    )
    angles = at[..., None, None] * torch.tensor(position.frequencies, dtype=torch.float64)
    compare(rotary.scale * angles.cos(), cos, 1e-4)
    compare(rotary.scale * angles.sin(), sin, 1e-4)


__all__ = ["assert_recomputed", "captured", "found", "values_of"]
