"""Read a stored tensor as a formula of its indices, by comparing all of its elements."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from torch import Tensor

from subquad.ir.mask import FloorDiv
from subquad.passes.recognize.mask_choice import choose
from subquad.passes.recognize.mask_relation import conjoin, disjoin, negate, relate
from subquad.passes.recognize.symbolic_tensor import axis, number

LARGEST = 1 << 26
MOST_LISTED = 16


def read_constant(tensor: Tensor) -> sympy.Basic | None:
    """A formula that equals the tensor at every index, or None.

    Known forms: one value everywhere; start + step·i along the last axis; a short list of integers; two values over the
    last two axes, told apart by a band (triangular buffers), by blocks or strides within a band, or by a prefix beside one.
    Every element is compared, so a formula is a proof for the tensor as it is now.
    """
    if tensor.numel() == 0 or tensor.numel() > LARGEST or tensor.dtype.is_complex:
        return None
    tensor = tensor.detach().cpu()
    first = tensor.flatten()[0]
    if bool((tensor == first).all()):
        return number(first.item())
    along = axis(tensor.dim() - 1)
    if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool:
        line = tensor.reshape(-1, tensor.shape[-1]).long()
        step = int(line[0, 1] - line[0, 0]) if tensor.shape[-1] > 1 else 0
        expected = int(line[0, 0]) + step * torch.arange(tensor.shape[-1])
        if bool((line == expected).all()):
            return int(line[0, 0]) + step * along
        if tensor.dim() == 1 and tensor.numel() <= MOST_LISTED:
            return _listed(tensor, along)
    return _two_valued(tensor) if tensor.dim() >= 2 else None


def _listed(tensor: Tensor, along: sympy.Symbol) -> sympy.Basic:
    *others, last = (sympy.Integer(int(value)) for value in tensor)
    found: sympy.Basic = last
    for n, value in reversed(list(enumerate(others))):
        found = choose(relate("eq", along, sympy.Integer(n)), value, found)
    return found


def _two_valued(tensor: Tensor) -> sympy.Basic | None:
    rows, columns = tensor.shape[-2:]
    plane = tensor.reshape(-1, rows, columns)
    if not bool((plane == plane[:1]).all()):
        return None
    plane = plane[0]
    inside, others = plane[0, 0], plane[plane != plane[0, 0]]
    if others.numel() == 0 or not bool((others == others[0]).all()):
        return None
    condition = next(_regions(plane == inside, axis(tensor.dim() - 2), axis(tensor.dim() - 1)), None)
    if condition is None:
        return None
    if tensor.dtype == torch.bool:
        return condition if bool(inside) else negate(condition)
    return choose(condition, number(inside.item()), number(others[0].item()))


def _regions(member: Tensor, row: sympy.Symbol, column: sympy.Symbol) -> Iterator[sympy.Basic]:
    """Conditions on (row, column) that hold exactly for the members; the element at (0, 0) is one."""
    rows, columns = member.shape
    q, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    band, within = _band(member, q - k, row - column)
    if torch.equal(member, within):
        yield band
    everywhere = (sympy.true, torch.ones_like(member))
    block = int((~member[:, 0]).int().argmax()) or int((~member[0]).int().argmax())
    line = member[-1].flip(0) if rows >= columns else member[0]
    stride = int(line[1:].int().argmax()) + 1
    for condition, inside in (everywhere, (band, within)):
        if block and torch.equal(member, inside & (q // block == k // block)):
            same = relate("eq", FloorDiv(row, sympy.Integer(block)), FloorDiv(column, sympy.Integer(block)))
            yield conjoin(condition, same)
        if stride > 1 and torch.equal(member, inside & ((q - k) % stride == 0)):
            yield conjoin(condition, relate("eq", sympy.Mod(row - column, stride), sympy.S.Zero))
    prefix = int(member.all(0).int().argmin())
    band, within = _band(member[:, prefix:], (q - k)[:, prefix:], row - column)
    if prefix and torch.equal(member, (q - k >= _lowest(within, (q - k)[:, prefix:])) | (k < prefix)):
        yield disjoin(band, relate("lt", column, sympy.Integer(prefix)))


def _lowest(within: Tensor, distance: Tensor) -> int:
    return int(distance[within].min()) if bool(within.any()) else int(distance.max()) + 1


def _band(member: Tensor, distance: Tensor, formula: sympy.Basic) -> tuple[sympy.Basic, Tensor]:
    """The least band of diagonals that holds all members, as a condition and as a tensor."""
    if not bool(member.any()):
        return sympy.false, torch.zeros_like(member)
    low, high = int(distance[member].min()), int(distance[member].max())
    parts = []
    if low > int(distance.min()):
        parts.append(relate("ge", formula, sympy.Integer(low)))
    if high < int(distance.max()):
        parts.append(relate("le", formula, sympy.Integer(high)))
    return conjoin(*parts), (distance >= low) & (distance <= high)
