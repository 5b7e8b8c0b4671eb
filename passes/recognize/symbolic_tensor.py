"""A tensor as a formula of its indices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv as SizeDiv

from subquad.ir.mask import Where
from subquad.passes.recognize.mask_arithmetic import is_integer, number
from subquad.passes.recognize.mask_choice import NoFormula, choose, is_boolean, leaves
from subquad.passes.recognize.mask_relation import python_number, relate

__all__ = ["SymbolicTensor", "as_condition", "as_number", "axis", "is_boolean", "is_hard", "is_one", "number", "size_of",
           "substitute", "visible", "where_zero"]  # fmt: skip

HARD = -1e30
"""Added to any score below 1e22 this is itself, and its probability is exactly zero beside any such score.

finfo.min of bfloat16, float32 and float64 is below it; that of float16 (-65504) is not: scores of its size exist there,
so it stays an additive bias, as -1e4 does.
"""


@cache
def axis(place: int) -> sympy.Symbol:
    """The index symbol of an axis, counted from the left."""
    return sympy.Symbol(f"i{place}", integer=True, nonnegative=True)


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


def _hint(size: sympy.Basic, environment: Any) -> int | None:
    try:
        return int(environment.guarding_hint_or_throw(size))
    except Exception:  # the size depends on data, or this torch has no such method
        return None


@lru_cache(maxsize=128)
def settled(size: sympy.Basic, environment: Any) -> sympy.Basic:
    """A size without the quotients that the capture decided: those proved to be a number, and s for n·(s // n) proved to be s."""
    for symbol in size.free_symbols if not size.is_Symbol else ():
        if environment._maybe_evaluate_static(sympy.Eq(size, symbol)) == sympy.true:
            return symbol
    known = {}
    for quotient in size.atoms(SizeDiv):
        hint = _hint(quotient, environment)
        if hint is not None and environment._maybe_evaluate_static(sympy.Eq(quotient, hint)) == sympy.true:
            known[quotient] = sympy.Integer(int(hint))
    return size.xreplace(known)


def size_of(value: Any) -> sympy.Basic:
    """A size or integer argument as a sympy expression."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return settled(expression, value.node.shape_env) if expression.has(SizeDiv) else expression
    if isinstance(value, (bool, int)):
        return sympy.Integer(int(value))
    if isinstance(value, float):
        return number(value)
    raise TypeError(f"{value!r} is not a number")


def substitute(expression: sympy.Basic, values: dict[sympy.Basic, sympy.Basic]) -> sympy.Basic:
    """Simultaneous replacement that re-evaluates, without searching for patterns."""
    changed = {key: value for key, value in values.items() if key != value}
    return expression.xreplace(changed) if changed else expression


def as_number(expression: sympy.Basic) -> sympy.Basic:
    """A condition as 1 or 0."""
    return choose(expression, sympy.S.One, sympy.S.Zero) if is_boolean(expression) else expression


def as_condition(expression: sympy.Basic) -> sympy.Basic:
    """A number as the condition that it is not zero.  Exact in every dtype: no integer but zero rounds to zero.

    Raises NoFormula for what may be a fraction: predicates read whole numbers only.
    """
    if is_boolean(expression):
        return expression
    if isinstance(expression, Where):
        condition, yes, no = expression.args
        return choose(condition, as_condition(yes), as_condition(no))
    if not (expression.is_number or is_integer(expression)):
        raise NoFormula
    return relate("ne", expression, sympy.S.Zero)


def is_hard(expression: sympy.Basic) -> bool:
    """True for a number so low that its probability is exactly zero beside any finite score."""
    return bool(expression.is_number) and expression is not sympy.nan and python_number(expression) <= HARD


def visible(expression: sympy.Basic) -> tuple[sympy.Basic, bool] | None:
    """Read an additive mask: (condition under which a key is seen, whether hidden keys get -inf).

    None when the mask adds anything but zero to a visible key, a soft value to a hidden one, or different values to hidden
    keys: a row that sees no key would then be more than the mean of all values.
    """
    values = leaves(expression)
    if not all(value.is_number and (value == 0 or is_hard(value)) for value in values):
        return None
    hidden = [value for value in values if value != 0]
    if len(hidden) > 1:
        return None
    seen = where_zero(expression)
    return seen, all(value == -sympy.oo for value in hidden)


def where_zero(expression: sympy.Basic) -> sympy.Basic:
    """The condition under which a choice of numbers is zero."""
    if not isinstance(expression, Where):
        return sympy.true if expression == 0 else sympy.false
    condition, yes, no = expression.args
    return choose(condition, where_zero(yes), where_zero(no))
