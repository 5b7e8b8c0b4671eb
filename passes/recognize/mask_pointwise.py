"""Rules of the mask algebra for operations on one element at a time."""

from __future__ import annotations

import sympy
import torch

from subquad.ir.graph import dtype_of, shape_of
from subquad.ir.mask import Where
from subquad.passes.recognize.index_map import IndexMap, trace_view
from subquad.passes.recognize.mask_arithmetic import (
    OPERATIONS,
    WIDE_INTEGERS,
    absorbs,
    common_dtype,
    compared,
    executed,
    is_index,
    is_integer,
    kept,
    rounded_down,
    stored,
)
from subquad.passes.recognize.mask_choice import NoFormula, choose, is_boolean, spread
from subquad.passes.recognize.mask_relation import conjoin, disjoin, either, negate, never_negative, reads, relate
from subquad.passes.recognize.mask_rules import Operation, leafwise, rule
from subquad.passes.recognize.symbolic_tensor import as_condition, axis, is_one

MOST_MEMBERS = 16


def _truth_as_number(value: sympy.Basic) -> sympy.Basic:
    return sympy.Integer(int(value == sympy.true)) if is_boolean(value) else value


def _run(op: Operation, values: dict[str, sympy.Basic]) -> sympy.Basic:
    """The operation itself on numbers."""
    nodes = {op[name]: value for name, value in values.items() if op.is_tensor(name)}
    return _truth_as_number(executed(op.node, nodes))


def _binary(op: Operation, operation: str) -> sympy.Basic:
    compute = OPERATIONS[operation]

    def leaf(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
        if a.is_number and b.is_number:
            if b == 0 and operation in ("fraction", "floordiv", "mod"):
                raise NoFormula  # the sign of zero decides, and formulas do not keep it
            return _run(op, {"a": a, "b": b})
        if op.kind == "add" and (a.is_number or b.is_number):
            number, other = (a, b) if a.is_number else (b, a)
            if absorbs(number, other, op.dtype):
                return stored(number, op.dtype)
        if not (is_integer(a) and is_integer(b)):
            raise NoFormula
        a, b = kept(a, op.dtype), kept(b, op.dtype)
        if operation in ("floordiv", "mod") and op.dtype.is_floating_point and not (is_index(a) and is_index(b)):
            raise NoFormula
        found = compute(a, b)
        return found if operation == "fraction" else kept(found, op.dtype)

    return leafwise(op, ("a", "b"), leaf)


@rule("add", "sub", "rsub", "mul", "floordiv", "mod", "maximum", "minimum")
def _arithmetic(op: Operation) -> sympy.Basic | None:
    if op.kind in ("maximum", "minimum") and not op.is_tensor("b"):
        return None
    if op.arguments.get("alpha", 1) != 1:
        return None
    if op.dtype == torch.bool:
        joins = {"add": disjoin, "mul": conjoin, "maximum": disjoin, "minimum": conjoin}
        join = joins.get(op.kind)
        return None if join is None else join(op.condition("a"), op.condition("b"))
    return _binary(op, op.kind)


@rule("div")
def _division(op: Operation) -> sympy.Basic | None:
    mode = op.arguments.get("rounding_mode")
    if mode is None:
        return _binary(op, "fraction")
    if mode == "floor":
        return _binary(op, "floordiv")
    return _truncated_division(op) if mode == "trunc" else None


def _truncated_division(op: Operation) -> sympy.Basic:
    """Rounding towards zero is rounding the magnitude down."""
    return leafwise(op, ("a", "b"), lambda a, b: _truncated(op, a, b, "floordiv"))


@rule("fmod")
def _truncated_remainder(op: Operation) -> sympy.Basic:
    """The remainder of the magnitudes with the sign of the dividend."""
    return leafwise(op, ("a", "b"), lambda a, b: _truncated(op, a, b, "mod"))


def _truncated(op: Operation, a: sympy.Basic, b: sympy.Basic, operation: str) -> sympy.Basic:
    if a.is_number and b.is_number:
        return _run(op, {"a": a, "b": b})
    if not (is_integer(a) and is_integer(b) and never_negative(b)):
        raise NoFormula
    if op.dtype.is_floating_point and not (is_index(a) and is_index(b)):
        raise NoFormula
    a, b = kept(a, op.dtype), kept(b, op.dtype)
    above = kept(OPERATIONS[operation](a, b), op.dtype)
    if never_negative(a):
        return above
    below = kept(-OPERATIONS[operation](sympy.expand(-a), b), op.dtype)
    return choose(relate("ge", a, sympy.S.Zero), above, below)


@rule("le", "lt", "ge", "gt", "eq", "ne")
def _comparison(op: Operation) -> sympy.Basic:
    dtype = common_dtype((op["a"], op["b"]))
    sides = _of_one_tensor(op)
    if sides is not None:
        return compared(op.kind, *sides, dtype)

    def leaf(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
        return compared(op.kind, a, b, dtype)

    return spread(leaf, (op.value("a"), op.value("b")))


def _of_one_tensor(op: Operation) -> tuple[sympy.Basic, sympy.Basic] | None:
    """Two elements of one integer tensor (numbers of documents), where its formula is a choice that tables decide.

    The tensor is read as a table then: which choice was made at either place says nothing about their being equal.
    """
    if not (op.is_tensor("a") and op.is_tensor("b")):
        return None
    start = tuple(sympy.S.Zero if is_one(size) else axis(n) for n, size in enumerate(op.shape))
    found = []
    for name in ("a", "b"):
        shape = shape_of(op[name]) or ()
        aligned = start[len(start) - len(shape) :]
        at = IndexMap(op[name], tuple(sympy.S.Zero if is_one(n) else i for n, i in zip(shape, aligned, strict=True)))
        while (before := trace_view(at)) is not None:
            at = before
        found.append(at)
    base = found[0].node
    if base is not found[1].node or dtype_of(base) not in WIDE_INTEGERS:
        return None
    formula = op.algebra.read(base).expression
    if not isinstance(formula, Where) or not reads(formula):
        return None
    table = op.algebra.as_table(base)
    return table.at(found[0].indices), table.at(found[1].indices)


@rule("and", "or", "xor")
def _logic(op: Operation) -> sympy.Basic | None:
    if op.dtype != torch.bool:
        return leafwise(op, ("a", "b"), lambda a, b: _numbers_only(op, a=a, b=b))
    a, b = op.condition("a"), op.condition("b")
    if op.kind == "xor":
        return either(a, negate(b), b)
    return conjoin(a, b) if op.kind == "and" else disjoin(a, b)


@rule("not")
def _negation(op: Operation) -> sympy.Basic | None:
    if op.dtype != torch.bool:
        return leafwise(op, ("x",), lambda x: _numbers_only(op, x=x))
    return negate(op.condition("x"))


def _numbers_only(op: Operation, **values: sympy.Basic) -> sympy.Basic:
    if not all(value.is_number for value in values.values()):
        raise NoFormula
    return _run(op, values)


@rule("neg", "abs")
def _sign_change(op: Operation) -> sympy.Basic:
    def leaf(x: sympy.Basic) -> sympy.Basic:
        if x.is_number:
            return _run(op, {"x": x})
        if not is_integer(x):
            raise NoFormula
        return kept(OPERATIONS[op.kind](x), op.dtype)

    return leafwise(op, ("x",), leaf)


@rule("sign", "relu", "isinf", "isnan", "isfinite", "nan_to_num")
def _of_numbers(op: Operation) -> sympy.Basic:
    return leafwise(op, ("x",), lambda x: _numbers_only(op, x=x))


@rule("exp", "log")
def _special_values(op: Operation) -> sympy.Basic:
    """exp and log where every implementation agrees: exp(0), exp(-inf), log(1), log(0)."""
    special = (sympy.S.Zero, -sympy.oo) if op.kind == "exp" else (sympy.S.One, sympy.S.Zero)

    def leaf(x: sympy.Basic) -> sympy.Basic:
        if x not in special:
            raise NoFormula
        return _run(op, {"x": x})

    return leafwise(op, ("x",), leaf)


@rule("floor", "ceil", "trunc", "round")
def _rounding(op: Operation) -> sympy.Basic | None:
    """Integers stay; a quotient of indices is rounded down, or towards zero where it is not negative."""
    if op.arguments.get("decimals"):
        return None

    def leaf(x: sympy.Basic) -> sympy.Basic:
        if x.is_number:
            return _run(op, {"x": x})
        if is_integer(x):
            return x
        return _rounded(x, op.kind)

    return leafwise(op, ("x",), leaf)


def _rounded(x: sympy.Basic, how: str) -> sympy.Basic:
    if how == "floor" or (how == "trunc" and never_negative(sympy.fraction(sympy.together(x))[0])):
        return rounded_down(x)
    raise NoFormula


@rule("clamp")
def _clamped(op: Operation) -> sympy.Basic | None:
    bounds = [name for name in ("min", "max") if op.arguments.get(name) is not None]

    def leaf(x: sympy.Basic, *limits: sympy.Basic) -> sympy.Basic:
        if x.is_number and all(limit.is_number for limit in limits):
            return _run(op, {"x": x, **dict(zip(bounds, limits, strict=True))})
        found = x
        for name, limit in zip(bounds, limits, strict=True):
            if not (is_integer(x) and is_integer(limit)):
                raise NoFormula
            found = OPERATIONS["maximum" if name == "min" else "minimum"](found, kept(limit, op.dtype))
        return kept(found, op.dtype)

    return leafwise(op, ("x", *bounds), leaf)


@rule("where")
def _choice(op: Operation) -> sympy.Basic:
    return _chosen(op, op.condition("cond"), "a", "b")


@rule("masked_fill")
def _fill(op: Operation) -> sympy.Basic:
    return _chosen(op, op.condition("mask"), "value", "x")


def _chosen(op: Operation, condition: sympy.Basic, yes: str, no: str) -> sympy.Basic:
    if op.dtype == torch.bool:
        return either(condition, op.condition(yes), op.condition(no))
    return choose(condition, held(op, yes), held(op, no))


def held(op: Operation, name: str) -> sympy.Basic:
    """An argument whose elements are copied to the result, as the result's dtype holds them."""
    value = op.value(name)
    if op.is_tensor(name) and op.source_dtype(name) == op.dtype:
        return value
    return spread(lambda x: kept(x, op.dtype), (value,))


@rule("cast")
def _cast(op: Operation) -> sympy.Basic | None:
    if op.dtype == torch.bool:
        return op.condition("x")
    source = op.source_dtype("x")

    def leaf(x: sympy.Basic) -> sympy.Basic:
        if x.is_number:
            return stored(x, op.dtype)
        if source == op.dtype:
            return x
        if source.is_floating_point and not op.dtype.is_floating_point:
            if x.is_integer and is_index(x):
                return kept(x, op.dtype)
            return kept(_rounded(x, "trunc"), op.dtype)
        return kept(x, op.dtype)

    return leafwise(op, ("x",), leaf)


@rule("contiguous")
def _same(op: Operation) -> sympy.Basic | None:
    return op.element("x") if len(shape_of(op["x"]) or ()) == op.rank else None


@rule("isin")
def _member(op: Operation) -> sympy.Basic | None:
    """Among the elements of a tensor that holds few."""
    if not (op.is_tensor("x") and op.is_tensor("among")) or op.arguments.get("invert"):
        return None
    among = op.read("among")
    if among.rank > 1 or any(not isinstance(size, int) or size > MOST_MEMBERS for size in among.shape):
        return None
    elements = [among.at((sympy.Integer(n),)) for n in range(among.shape[0])] if among.rank else [among.expression]
    dtype = common_dtype((op["x"], op["among"]))
    x = op.value("x")
    return disjoin(*(spread(lambda a, b: compared("eq", a, b, dtype), (x, element)) for element in elements))


@rule("one_hot")
def _one_hot(op: Operation) -> sympy.Basic:
    """1 where the last index is the element; elements are never outside, which the operation itself checks."""
    base = op.read("x")
    condition = spread(lambda x: relate("eq", axis(base.rank), x), (base.expression,))
    return choose(as_condition(condition), sympy.S.One, sympy.S.Zero)
