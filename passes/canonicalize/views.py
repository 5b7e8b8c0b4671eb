"""View operations as steps that can be taken backwards: put a changed view back into the tensor it is a view of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import rank_of, shape_of, value_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.canonicalize.mutation import Unsupported

Node = torch.fx.Node
aten = torch.ops.aten
Emit = Callable[..., Node]


@dataclass(frozen=True)
class Step:
    """One view: forward makes it from a tensor; backward(emit, tensor, view) is the tensor with the view's new content."""

    forward: Callable[[Emit, Node], Node]
    backward: Callable[[Emit, Node, Node], Node]


def select(dim: Any, index: Any) -> Step:
    """One entry of an axis."""
    return Step(
        lambda emit, x: emit(aten.select.int, x, dim, index),
        lambda emit, x, y: emit(aten.select_scatter.default, x, y, dim, index),
    )


def slice_axis(dim: Any, start: Any, end: Any, step: Any = 1) -> Step:
    """A range of an axis."""
    return Step(
        lambda emit, x: emit(aten.slice.Tensor, x, dim, start, end, step),
        lambda emit, x, y: emit(aten.slice_scatter.default, x, y, dim, start, end, step),
    )


def new_axis(dim: int) -> Step:
    """An axis of size one."""
    return Step(
        lambda emit, x: emit(aten.unsqueeze.default, x, dim),
        lambda emit, _, y: emit(aten.squeeze.dim, y, dim),
    )


def _never(_: Emit, __: Node) -> Node:
    raise AssertionError("only the last step of a view is taken backwards alone")


def _undone(backward: Callable[[Emit, Node, Node], Node]) -> list[Step]:
    return [Step(_never, backward)]


def steps_of(node: Node) -> list[Step]:
    """The steps of a view node, none for an alias of the whole tensor.

    Raises Unsupported for a view that cannot be taken backwards.
    """
    parent, name = node.args[0], kind(node)
    if not isinstance(parent, Node):
        raise _unknown(node)
    if node.target is operator.getitem and not isinstance(value_of(parent), torch.Tensor):
        return [_piece(parent, node.args[1])]
    before, after = value_of(parent), value_of(node)
    if before.dtype != after.dtype:
        raise _unknown(node)
    if name == "getitem":
        steps, indices = basic_steps(node.args[1], rank_of(parent) or 0)
        if indices:
            raise _unknown(node)
        return steps
    if name in ("contiguous", "cast") or (name == "expand" and before.shape == after.shape):
        return []
    if node.target in (getattr, "T", "mT", "H", "mH") or name == "t":
        attribute = node.args[1] if node.target is getattr else ""
        if attribute in ("data", "real"):
            return []
        return _undone(lambda emit, _, y: emit(aten.transpose.int, y, -2, -1)) if before.dim() > 1 else []
    a = arguments(node) if name else {}
    if name == "unsqueeze" and isinstance(a["dim"], int):
        return [new_axis(a["dim"])]
    if name in ("view", "flatten", "unflatten", "squeeze", "unsqueeze"):
        return _undone(lambda emit, x, y: emit(aten.reshape_as.default, y, x))
    if name == "transpose":
        return _undone(lambda emit, _, y: emit(aten.transpose.int, y, a["dim0"], a["dim1"]))
    if name == "permute":
        dims = [int(d) % before.dim() for d in a["dims"]]
        return _undone(lambda emit, _, y: emit(aten.permute.default, y, [dims.index(n) for n in range(len(dims))]))
    if name == "movedim":
        source, destination = ([d] if isinstance(d, int) else list(d) for d in (a["source"], a["destination"]))
        return _undone(lambda emit, _, y: emit(aten.movedim.intlist, y, destination, source))
    if name == "select":
        return [select(a["dim"], a["index"])]
    if name == "slice":
        return [slice_axis(a["dim"], a["start"], a["end"], a["step"])]
    if name == "narrow" and isinstance(a["start"], int) and isinstance(a["length"], int):
        return [slice_axis(a["dim"], a["start"], a["start"] + a["length"])]
    if str(getattr(node.target, "__name__", node.target)).startswith("diagonal"):
        given = dict(zip(("offset", "dim1", "dim2"), node.args[1:], strict=False)) | node.kwargs
        offset, one, two = given.get("offset", 0), given.get("dim1", 0), given.get("dim2", 1)
        return _undone(lambda emit, x, y: emit(aten.diagonal_scatter.default, x, y, offset, one, two))
    raise _unknown(node)


def _unknown(node: Node) -> Unsupported:
    name = getattr(node.target, "__name__", node.target)
    return Unsupported(f"a tensor is changed in place through a view made by `{name}`, which cannot be taken backwards")


def _piece(parts: Node, index: Any) -> Step:
    """One part of unbind, split or chunk."""
    name = kind(parts)
    if not isinstance(index, int) or name not in ("unbind", "split", "split_with_sizes", "chunk"):
        raise _unknown(parts)
    a = arguments(parts)
    values = value_of(parts)
    index %= len(values)
    if name == "unbind":
        return select(a["dim"], index)
    sizes = [part.shape[a["dim"]] for part in values[: index + 1]]
    if not all(isinstance(size, int) for size in sizes):
        raise _unknown(parts)
    return slice_axis(a["dim"], sum(sizes[:-1]), sum(sizes))


def basic_steps(index: Any, rank: int) -> tuple[list[Step], list[Any]]:
    """What `x[index]` does: the steps for numbers, slices, None and Ellipsis, then the tensors it indexes with.

    The second list holds None or a tensor for the axes of the view, as aten.index_put takes them; empty without tensors.
    Raises Unsupported for an index of another kind.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(_axes(item) for item in items)
    if any(item is Ellipsis for item in items):
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (rank - consumed)
    steps: list[Step] = []
    indices: list[Any] = []
    dim = 0
    for item in items:
        if isinstance(item, Node) and isinstance(value_of(item), torch.Tensor):
            indices += [None] * (dim - sum(_axes(i) if i is not None else 1 for i in indices)) + [item]
            dim += _axes(item)
        elif item is None:
            steps.append(new_axis(dim))
            dim += 1
        elif isinstance(item, slice):
            if item != slice(None):
                steps.append(slice_axis(dim, item.start, item.stop, 1 if item.step is None else item.step))
            dim += 1
        elif (isinstance(item, int) and not isinstance(item, bool)) or isinstance(item, Node):
            steps.append(select(dim, item))
        else:
            raise Unsupported(f"an assignment through the index {item!r} has no functional form")
    return steps, indices


def _axes(item: Any) -> int:
    """How many axes of the indexed tensor an item of an index takes up."""
    if item is None or item is Ellipsis:
        return 0
    value = value_of(item) if isinstance(item, Node) else None
    if isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8):
        return value.dim()
    return 1


def leading_ones_dropped(emit: Emit, value: Node, rank: int) -> Node:
    """An assigned tensor of more axes than the place it goes to, without its leading axes of size one."""
    for _ in range(len(shape_of(value) or ()) - rank):
        value = emit(aten.squeeze.dim, value, 0)
    return value
