"""Read a stored tensor as a formula of its indices, by comparing all of its elements."""

from __future__ import annotations

import sympy
import torch

from subquad.ir.mask import Where
from subquad.passes.recognize.symbolic_tensor import axis, number

LARGEST = 1 << 26


def read_constant(tensor: torch.Tensor) -> sympy.Basic | None:
    """A formula that equals the tensor at every index, or None.

    Known forms: one value everywhere; start + step·i along the last axis; two values separated by a band of the last two
    axes (triangular buffers).  Every element is compared, so a formula is a proof for the tensor as it is now.
    """
    if tensor.numel() == 0 or tensor.numel() > LARGEST or tensor.dtype.is_complex:
        return None
    tensor = tensor.detach().cpu()
    first = tensor.flatten()[0]
    if bool((tensor == first).all()):
        return number(first.item())
    along = axis(tensor.dim() - 1)
    if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool:
        line = tensor.reshape(-1, tensor.shape[-1])
        step = int(line[0, 1] - line[0, 0]) if tensor.shape[-1] > 1 else 0
        expected = int(line[0, 0]) + step * torch.arange(tensor.shape[-1])
        if bool((line == expected).all()):
            return int(line[0, 0]) + step * along
    if tensor.dim() >= 2:
        return _band(tensor, axis(tensor.dim() - 2), along)
    return None


def _band(tensor: torch.Tensor, row: sympy.Symbol, column: sympy.Symbol) -> sympy.Basic | None:
    rows, columns = tensor.shape[-2:]
    plane = tensor.reshape(-1, rows, columns)
    if not bool((plane == plane[:1]).all()):
        return None
    plane = plane[0]
    distance = torch.arange(rows)[:, None] - torch.arange(columns)[None, :]
    inside = plane[0, 0]
    member = plane == inside
    low, high = int(distance[member].min()), int(distance[member].max())
    others = plane[~member]
    if not bool((others == others[0]).all()):
        return None
    if not torch.equal(member, (distance >= low) & (distance <= high)):
        return None
    conditions = []
    if low > -(columns - 1):
        conditions.append(sympy.Ge(row - column, low))
    if high < rows - 1:
        conditions.append(sympy.Le(row - column, high))
    condition = sympy.And(*conditions)
    yes, no = number(inside.item()), number(others[0].item())
    if tensor.dtype == torch.bool:
        return condition if bool(inside) else sympy.Not(condition)
    return Where(condition, yes, no)
