"""Formulas that choose between values: `Where` trees whose leaves are numbers or integer formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
from sympy.core.function import AppliedUndef

from subquad.ir.mask import Where
from subquad.passes.recognize.mask_relation import conjoin, disjoin, either, negate, reads

MOST_LEAVES = 64
"""Combinations of leaves that one operation may have; more and the tensor stays a tensor."""


class NoFormula(Exception):
    """The operation has no exact formula here; the tensor is then read as a table of its own elements."""


def is_boolean(expression: sympy.Basic) -> bool:
    """True for truth values and conditions."""
    return isinstance(expression, sympy.logic.boolalg.Boolean) and not isinstance(expression, sympy.Symbol)


def choose(condition: sympy.Basic, yes: sympy.Basic, no: sympy.Basic) -> sympy.Basic:
    """`yes` where the condition holds, `no` elsewhere: a condition when both are, else a flat choice.

    What a branch knows is used: under x = 3 the formula 3 - x is 0.  A value that occurs twice is one leaf.
    """
    if is_boolean(yes) and is_boolean(no):
        return either(condition, yes, no)
    opposite = negate(condition)
    yes, no = assume(settled(yes, condition), condition), assume(settled(no, opposite), opposite)
    if isinstance(yes, Where) and no in yes.args[1:]:
        inner, first, second = yes.args
        if no == second:
            return _where(conjoin(condition, inner), first, second)
        return _where(conjoin(condition, negate(inner)), second, first)
    if isinstance(no, Where) and yes in no.args[1:]:
        inner, first, second = no.args
        if yes == first:
            return _where(disjoin(condition, inner), first, second)
        return _where(disjoin(condition, negate(inner)), second, first)
    return _where(condition, yes, no)


def _where(condition: sympy.Basic, yes: sympy.Basic, no: sympy.Basic) -> sympy.Basic:
    return Where(condition, yes, no)


def settled(value: sympy.Basic, condition: sympy.Basic) -> sympy.Basic:
    """The value with a table's element replaced by the number that the condition says it is."""
    if value.is_number or is_boolean(value):
        return value
    for part in condition.args if isinstance(condition, sympy.And) else (condition,):
        if not isinstance(part, sympy.Eq) or not part.rhs.is_Integer:
            continue
        element = part.lhs
        if isinstance(element, AppliedUndef) and element.is_integer and element in reads(value):
            value = value.xreplace({element: part.rhs})
    return value


def assume(value: sympy.Basic, condition: sympy.Basic) -> sympy.Basic:
    """The value where a condition is known to hold: choices on that condition are made."""
    if not isinstance(value, Where):
        return value
    inner, yes, no = value.args
    known = set(condition.args) if isinstance(condition, sympy.And) else {condition}
    if inner in known or inner == condition:
        return assume(yes, condition)
    if negate(inner) in known or negate(inner) == condition:
        return assume(no, condition)
    first, second = assume(yes, condition), assume(no, condition)
    return value if (first, second) == (yes, no) else choose(inner, first, second)


def leaves(value: sympy.Basic) -> tuple[sympy.Basic, ...]:
    """The distinct values that a formula chooses between."""
    if not isinstance(value, Where):
        return (value,)
    return tuple(dict.fromkeys((*leaves(value.args[1]), *leaves(value.args[2]))))


def spread(function: Callable[..., sympy.Basic], operands: Sequence[sympy.Basic]) -> sympy.Basic:
    """function(*operands) with every choice pushed outwards, so that the function meets only leaves.

    Raises NoFormula when there are too many combinations.
    """
    met = 0

    def go(items: tuple[sympy.Basic, ...]) -> sympy.Basic:
        nonlocal met
        first = next((item for item in items if isinstance(item, Where)), None)
        if first is None:
            met += 1
            if met > MOST_LEAVES:
                raise NoFormula
            return function(*items)
        condition = first.args[0]
        opposite = negate(condition)
        yes = go(tuple(assume(item, condition) for item in items))
        no = go(tuple(assume(item, opposite) for item in items))
        return choose(condition, yes, no)

    return go(tuple(operands))
