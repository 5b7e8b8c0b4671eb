"""Rules of the mask algebra for tensors made of nothing: ranges, constants, triangles."""

from __future__ import annotations

import sympy
import torch

from subquad.passes.recognize.mask_arithmetic import kept, stored
from subquad.passes.recognize.mask_choice import NoFormula, choose, is_boolean, spread
from subquad.passes.recognize.mask_relation import conjoin, relate
from subquad.passes.recognize.mask_rules import Operation, rule
from subquad.passes.recognize.symbolic_tensor import as_condition, axis


@rule("arange")
def _arange(op: Operation) -> sympy.Basic:
    start, step = op.size("start"), op.size("step")
    if not (start.is_integer and step.is_integer):
        raise NoFormula
    length = op.shape[0]
    if isinstance(length, int) and start.is_Integer and step.is_Integer:
        for end in (start, start + step * (length - 1)):
            stored(end, op.dtype)
        if not op.dtype.is_floating_point:
            return start + step * axis(0)
    return kept(start + step * axis(0), op.dtype)


@rule("full", "new_full", "full_like", "scalar_tensor")
def _filled(op: Operation) -> sympy.Basic:
    if op.dtype == torch.bool:
        return op.condition("value")
    return spread(lambda x: kept(x, op.dtype), (op.value("value"),))


@rule("ones", "new_ones", "ones_like")
def _ones(op: Operation) -> sympy.Basic:
    return sympy.true if op.dtype == torch.bool else sympy.S.One


@rule("zeros", "new_zeros", "zeros_like")
def _zeros(op: Operation) -> sympy.Basic:
    return sympy.false if op.dtype == torch.bool else sympy.S.Zero


@rule("eye")
def _identity(op: Operation) -> sympy.Basic:
    diagonal = relate("eq", axis(0), axis(1))
    return diagonal if op.dtype == torch.bool else choose(diagonal, sympy.S.One, sympy.S.Zero)


@rule("tril", "triu")
def _triangle(op: Operation) -> sympy.Basic:
    rows, columns = axis(op.rank - 2), axis(op.rank - 1)
    kept_part = relate("le" if op.kind == "tril" else "ge", columns, rows + op.size("diagonal"))
    base = op.element("x")
    if is_boolean(base):
        return conjoin(kept_part, base)
    return choose(as_condition(kept_part), base, sympy.S.Zero)
