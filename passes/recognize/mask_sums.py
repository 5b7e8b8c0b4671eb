"""Rules of the mask algebra that combine elements along an axis, where the answer does not depend on its length."""

from __future__ import annotations

import sympy
import torch

from subquad.ir.mask import FloorDiv
from subquad.passes.recognize.mask_arithmetic import is_index, is_integer, kept
from subquad.passes.recognize.mask_choice import NoFormula, is_boolean, spread
from subquad.passes.recognize.mask_relation import conjoin, disjoin
from subquad.passes.recognize.mask_rules import Operation, leafwise, rule
from subquad.passes.recognize.symbolic_tensor import as_condition, as_number, axis, is_one, substitute


@rule("cumsum")
def _running_sum(op: Operation) -> sympy.Basic:
    """The running sum of what is constant along the axis; in a float dtype only of zeros and ones."""
    if op.rank == 0:
        return op.value("x")
    along = axis(op.axis_number(op["dim"]))

    def leaf(x: sympy.Basic) -> sympy.Basic:
        if not is_integer(x) or (op.dtype.is_floating_point and x not in (0, 1)):
            raise NoFormula
        return kept(sympy.expand(x * (along + 1)), op.dtype)

    if along in op.element("x").free_symbols:
        raise NoFormula
    return leafwise(op, ("x",), leaf)


@rule("diff")
def _difference(op: Operation) -> sympy.Basic | None:
    if op["n"] != 1 or op["append"] is not None or op["prepend"] is None or op.dtype not in (torch.int64, torch.int32):
        return None
    base, before = op.read("x"), op.read("prepend")
    place = op.axis_number(op["dim"])
    if not is_one(before.shape[place]) or is_boolean(base.expression):
        return None
    here = axis(place)
    inside = base.expression - substitute(base.expression, {here: here - 1})
    first = substitute(base.expression, {here: sympy.S.Zero}) - before.expression
    inside, first = sympy.expand(inside), sympy.expand(first)
    return inside if inside == first and is_integer(inside) else None


@rule("any", "all")
def _joined(op: Operation) -> sympy.Basic | None:
    """Over an axis of size one or of a few elements; over a longer one the answer is no formula of the indices."""
    dim, base = op.arguments.get("dim"), op.read("x")
    if dim is None or (isinstance(dim, list | tuple) and len(dim) != 1) or op.dtype != torch.bool:
        return None
    place = (dim[0] if isinstance(dim, list | tuple) else dim) % max(base.rank, 1)
    size = base.shape[place] if base.rank else 1
    if not isinstance(size, int) or not 1 <= size <= 4:
        return None
    condition = as_condition(base.expression)
    keep = bool(op["keepdim"])
    moved = {axis(n): axis(n if keep else n - 1) for n in range(place + 1, base.rank)}
    parts = [condition.xreplace({**moved, axis(place): sympy.Integer(n)}) for n in range(size)]
    return (disjoin if op.kind == "any" else conjoin)(*parts)


@rule("matmul")
def _outer_product(op: Operation) -> sympy.Basic | None:
    """A product over one element: [.., n, 1] @ [.., 1, m], for masks that are zeros and ones."""
    left, right = op.read("a"), op.read("b")
    if left.rank < 2 or right.rank < 2 or not (is_one(left.shape[-1]) and is_one(right.shape[-2])):
        return None
    offset = op.rank - left.rank
    rows = tuple(sympy.S.Zero if is_one(s) else axis(n + offset) for n, s in enumerate(left.shape[:-1]))
    a = left.at((*rows, sympy.S.Zero))
    offset = op.rank - right.rank
    batch = tuple(sympy.S.Zero if is_one(s) else axis(n + offset) for n, s in enumerate(right.shape[:-2]))
    b = right.at((*batch, sympy.S.Zero, axis(op.rank - 1)))
    return _product(op, a, b)


@rule("outer")
def _outer(op: Operation) -> sympy.Basic | None:
    a, b = op.read("a"), op.read("b")
    return _product(op, a.at((axis(0),)), b.at((axis(1),)))


@rule("kron")
def _kronecker(op: Operation) -> sympy.Basic | None:
    """a[i // n]·b[i % n] along every axis, n the size of b's."""
    a, b = op.read("a"), op.read("b")
    if not a.rank == b.rank == op.rank or not all(isinstance(size, int) for size in b.shape):
        return None
    sizes = [sympy.Integer(size) for size in b.shape]
    whole = (sympy.S.Zero if is_one(n) else FloorDiv(axis(p), sizes[p]) for p, n in enumerate(a.shape))
    part = (sympy.Mod(axis(p), size) for p, size in enumerate(sizes))
    return _product(op, a.at(tuple(whole)), b.at(tuple(part)))


@rule("einsum")
def _einstein(op: Operation) -> sympy.Basic | None:
    """An outer product: every letter of the operands is in the result, once in each operand."""
    inputs, arrow, result = op["equation"].replace(" ", "").partition("->")
    words = inputs.split(",")
    operands = op["operands"]
    if not arrow or "." in inputs or len(words) != 2 or any(len(set(w)) != len(w) for w in (*words, result)):
        return None
    if set("".join(words)) != set(result):
        return None
    factors = []
    for word, node in zip(words, operands, strict=True):
        base = op.algebra.read(node)
        indices = tuple(
            sympy.S.Zero if is_one(size) else axis(result.index(letter))
            for letter, size in zip(word, base.shape, strict=True)
        )
        factors.append(base.at(indices))
    return _product(op, *factors)


def _product(op: Operation, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """Exact for zeros and ones in every dtype, and for indices in wide integers."""

    def leaf(x: sympy.Basic, y: sympy.Basic) -> sympy.Basic:
        if x in (0, 1) and y in (0, 1):
            return x * y
        if not (is_index(x) and is_index(y)) or op.dtype.is_floating_point:
            raise NoFormula
        return kept(sympy.expand(x * y), op.dtype)

    return spread(leaf, (as_number(a), as_number(b)))
