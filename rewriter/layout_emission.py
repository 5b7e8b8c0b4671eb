"""Emit the views between a graph's own layouts and the operators' [B, T, H, D] and [B, H, Tq, Tk]."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
import torch
import torch.fx
from torch.utils._sympy.functions import CleanDiv, PythonMod
from torch.utils._sympy.functions import FloorDiv as TorchFloorDiv
from torch.utils._sympy.functions import Mod as TorchMod

from subquad.ir.emitter import Emitter
from subquad.ir.graph import rank_of, shape_of, value_of
from subquad.ir.mask import FloorDiv
from subquad.ir.site import Operand, ScoreTensor, Site, View, unpacked_shape

Node = torch.fx.Node
aten = torch.ops.aten


def canonical(emitter: Emitter, operand: Operand, site: Site) -> Node:
    """The operand as [B, T, H, D]; what rows share, or positions or heads of the queries, gets the output's sizes."""
    node = operand.node
    for axis, sizes in reversed(operand.packed):
        node = emitter.call(aten.unflatten.int, node, axis, [size(emitter, s) for s in sizes])
    groups = [list(group) for group in operand.axes]
    held = {axis for group in groups for axis in group}
    for n in reversed([n for n in range(rank_of(node) or 0) if n not in held]):
        node = emitter.call(aten.squeeze.dim, node, n)
        groups = [[axis - (axis > n) for axis in group] for group in groups]
    order = [axis for group in groups for axis in group]
    if order != sorted(order):
        node = emitter.call(aten.permute.default, node, order)
    for place, group in reversed(list(enumerate(groups))):
        first = sum(len(g) for g in groups[:place])
        if len(group) > 1:
            node = emitter.call(aten.flatten.using_ints, node, first, first + len(group) - 1)
    for place, group in enumerate(groups):
        if not group:
            node = emitter.call(aten.unsqueeze.default, node, place)
    shape = unpacked_shape(shape_of(site.out) or (), site.packed)
    wide: list[Any] = [-1] * 4
    for place in (0, 1, 2) if operand is site.q else (0,):
        if not groups[place] and site.out_axes[place]:
            wide[place] = size(emitter, math.prod(shape[axis] for axis in site.out_axes[place]))
    return node if wide == [-1] * 4 else emitter.call(aten.expand.default, node, wide)


def restored(emitter: Emitter, node: Node, site: Site) -> Node:
    """From [B, T, H, V] to the axes of the replaced output."""
    shape = unpacked_shape(shape_of(site.out) or (), site.packed)
    for place in reversed(range(4)):
        group = site.out_axes[place]
        if not group:
            node = emitter.call(aten.squeeze.dim, node, place)
        elif len(group) > 1:
            inner = [size(emitter, shape[axis]) for axis in group[1:]]
            node = emitter.call(aten.unflatten.int, node, place, [-1, *inner])
    axes = [axis for group in site.out_axes for axis in group]
    order = sorted(range(len(axes)), key=lambda n: axes[n])
    if order != list(range(len(axes))):
        node = emitter.call(aten.permute.default, node, order)
    for axis in range(len(shape)):
        if axis not in axes:
            node = emitter.call(aten.unsqueeze.default, node, axis)
    for axis, sizes in site.packed:
        node = emitter.call(aten.flatten.using_ints, node, axis, axis + len(sizes) - 1)
    return node


def laid_out(emitter: Emitter, tensor: ScoreTensor) -> Node:
    """The tensor broadcastable to [B, H, Tq, Tk]."""
    node = tensor.node
    for view in tensor.views:
        node = _viewed(emitter, node, view)
    return node


def _viewed(emitter: Emitter, node: Node, view: View) -> Node:
    if view.name == "expand":
        axis, wide = view.arguments
        sizes = [-1] * (rank_of(node) or 0)
        sizes[axis] = size(emitter, wide)
        return emitter.call(aten.expand.default, node, sizes)
    if view.name == "unflatten":
        axis, sizes = view.arguments
        return emitter.call(aten.unflatten.int, node, axis, [size(emitter, s) for s in sizes])
    calls = {
        "squeeze": aten.squeeze.dim, "unsqueeze": aten.unsqueeze.default, "permute": aten.permute.default,
        "flatten": aten.flatten.using_ints,
    }  # fmt: skip
    return emitter.call(calls[view.name], node, *view.arguments)


def size(emitter: Emitter, value: Any) -> Any:
    """A size of the capture as an argument: the number itself, or a node that computes it."""
    return size_node(emitter, value.node.expr) if isinstance(value, torch.SymInt) else value


_OPERATIONS = {
    sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv, TorchFloorDiv: operator.floordiv,
    CleanDiv: operator.floordiv, sympy.Mod: operator.mod, TorchMod: operator.mod, PythonMod: operator.mod,
}  # fmt: skip


def size_node(emitter: Emitter, expression: sympy.Basic) -> Any:
    """A number, or a node that holds the value of a size formula, computed from inputs or read off an earlier tensor.

    Raises ValueError when no input has a size that the formula reads.
    """
    if expression.is_Integer:
        return int(expression)
    if not expression.is_Symbol:
        operation = _OPERATIONS.get(expression.func)
        if operation is None:
            return _held_size(emitter, expression)
        parts = [size_node(emitter, part) for part in expression.args]
        value = parts[0]
        for part in parts[1:]:
            value = emitter.call(operation, value, part)
        return value
    for node in emitter.graph.nodes:
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr == expression:
            if node < emitter.before:
                return node
        for axis, length in enumerate(shape_of(node) or ()):
            if node.op == "placeholder" and isinstance(length, torch.SymInt) and length.node.expr == expression:
                return emitter.call(aten.sym_size.int, node, axis)
    raise ValueError(f"no input of the graph has the size {expression}")


def _held_size(emitter: Emitter, expression: sympy.Basic) -> Node:
    """A node that holds a size which some tensor before the place of emission has."""
    for node in emitter.graph.nodes:
        if node is emitter.before:
            break
        for axis, length in enumerate(shape_of(node) or ()):
            if isinstance(length, torch.SymInt) and length.node.expr == expression:
                return emitter.call(aten.sym_size.int, node, axis)
    raise ValueError(f"a size is {expression}, which cannot be computed in the graph")
