"""A tensor as a formula of its indices, and the arithmetic on such formulas."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch

from subquad.ir.mask import FloorDiv, Where

HARD = -1e30
"""A fill at or below this value (finfo.min of every format from bf16 up, or -inf) leaves probability exactly zero."""


@cache
def axis(number: int) -> sympy.Symbol:
    """The index symbol of an axis, counted from the left."""
    return sympy.Symbol(f"i{number}", integer=True, nonnegative=True)


@dataclass(frozen=True)
class SymbolicTensor:
    """`expression` gives the element at (i0, …, i{r-1}); booleans are sympy booleans.  `shape` may hold SymInts."""

    expression: sympy.Basic
    shape: tuple[Any, ...]

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def at(self, indices: tuple[sympy.Basic, ...]) -> sympy.Basic:
        """The element at the given index formulas."""
        return substitute(self.expression, {axis(n): index for n, index in enumerate(indices)})

    def broadcast(self, shape: tuple[Any, ...]) -> sympy.Basic:
        """The element formula after broadcasting to `shape` (aligned at the right, axes of size one repeated)."""
        offset = len(shape) - self.rank
        return self.at(tuple(sympy.S.Zero if is_one(size) else axis(n + offset) for n, size in enumerate(self.shape)))


def is_one(size: Any) -> bool:
    """True when a size is the plain integer one."""
    return isinstance(size, int) and size == 1


def size_of(value: Any) -> sympy.Basic:
    """A size or integer argument as a sympy expression."""
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, (bool, int)):
        return sympy.Integer(int(value))
    if isinstance(value, float):
        return number(value)
    raise TypeError(f"{value!r} is not a number")


def number(value: Any) -> sympy.Basic:
    """A Python scalar as a sympy number or truth value."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if value != value:
        return sympy.nan
    if value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.Integer(int(value)) if float(value).is_integer() and abs(value) < 2**53 else sympy.Float(value)


def substitute(expression: sympy.Basic, values: dict[sympy.Basic, sympy.Basic]) -> sympy.Basic:
    """Simultaneous replacement that re-evaluates, without searching for patterns."""
    changed = {key: value for key, value in values.items() if key != value}
    return expression.xreplace(changed) if changed else expression


def is_boolean(expression: sympy.Basic) -> bool:
    """True for truth values and conditions."""
    return isinstance(expression, sympy.logic.boolalg.Boolean) and not isinstance(expression, sympy.Symbol)


def as_number(expression: sympy.Basic) -> sympy.Basic:
    """A condition as 1 or 0."""
    return Where(expression, sympy.S.One, sympy.S.Zero) if is_boolean(expression) else expression


def as_condition(expression: sympy.Basic) -> sympy.Basic:
    """A number as the condition that it is not zero."""
    return expression if is_boolean(expression) else compare("ne", expression, sympy.S.Zero)


_RELATIONS: dict[str, Callable[..., Any]] = {
    "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne,
}  # fmt: skip
_NUMERIC: dict[str, Callable[[float, float], bool]] = {
    "le": operator.le, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip


def compare(relation: str, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """A comparison; one with a two-valued side becomes a condition on what chooses the value."""
    a, b = as_number(a), as_number(b)
    if isinstance(a, Where) or isinstance(b, Where):
        left = a if isinstance(a, Where) else None
        chooser = left if left is not None else b
        condition, first, second = chooser.args
        yes = compare(relation, first, b) if left is not None else compare(relation, a, first)
        no = compare(relation, second, b) if left is not None else compare(relation, a, second)
        if yes == no:
            return yes
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    if a.is_number and b.is_number:
        return sympy.true if _NUMERIC[relation](float(a), float(b)) else sympy.false
    return _decided(_RELATIONS[relation](a, b))


def _decided(relation: sympy.Basic) -> sympy.Basic:
    """Decide a comparison whose two sides differ by a quantity of known sign."""
    if not isinstance(relation, sympy.core.relational.Relational):
        return relation
    difference = sympy.expand(relation.lhs - relation.rhs)
    if difference.is_Integer:
        name = {v: k for k, v in _RELATIONS.items()}[relation.func]
        return sympy.true if _NUMERIC[name](int(difference), 0) else sympy.false
    if isinstance(relation, sympy.Ge) and difference.is_nonnegative:
        return sympy.true
    if isinstance(relation, sympy.Lt) and difference.is_nonnegative:
        return sympy.false
    return relation


def combine(operation: str, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """Arithmetic on two element formulas; choices are pushed outwards so that masks stay recognisable."""
    a, b = as_number(a), as_number(b)
    if isinstance(a, Where):
        if isinstance(b, Where) and operation == "add" and _is_additive(a) and _is_additive(b):
            return Where(sympy.And(a.args[0], b.args[0]), combine("add", a.args[1], b.args[1]), -sympy.oo)
        return Where(a.args[0], combine(operation, a.args[1], b), combine(operation, a.args[2], b))
    if isinstance(b, Where):
        return Where(b.args[0], combine(operation, a, b.args[1]), combine(operation, a, b.args[2]))
    if operation == "add":
        return a + b
    if operation == "sub":
        return a - b
    if operation == "mul":
        return a * b
    if operation == "div":
        return a / b
    if operation == "floordiv":
        return FloorDiv(a, b)
    if operation == "mod":
        return sympy.Mod(a, b)
    raise KeyError(operation)


def _is_additive(expression: sympy.Basic) -> bool:
    return isinstance(expression, Where) and is_hard(expression.args[2]) and not isinstance(expression.args[1], Where)


def is_hard(expression: sympy.Basic) -> bool:
    """True for a number so low that its probability is exactly zero beside any finite score."""
    return bool(expression.is_number) and expression is not sympy.nan and float(expression) <= HARD


def visible(expression: sympy.Basic) -> tuple[sympy.Basic, bool] | None:
    """Read an additive mask: (condition under which a key is seen, whether hidden keys get -inf).

    None when the mask adds anything but zero to a visible key or a soft value to a hidden one.
    """
    if expression.is_number:
        value = float(expression)
        return (sympy.true, True) if value == 0 else (sympy.false, value == float("-inf")) if value <= HARD else None
    if not isinstance(expression, Where):
        return None
    condition, yes, no = expression.args
    first, second = visible(yes), visible(no)
    if first is None or second is None:
        return None
    seen = sympy.Or(sympy.And(condition, first[0]), sympy.And(sympy.Not(condition), second[0]))
    infinite = all(side[1] for side in (first, second) if side[0] != sympy.true)
    return seen, infinite
