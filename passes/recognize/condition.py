"""Compare conditions on integer indices in a normal form."""

from __future__ import annotations

from typing import Any

import sympy


def same_condition(a: sympy.Basic, b: sympy.Basic) -> bool:
    """True when two conditions on integers are the same but for spelling (a < b + 1 and b >= a)."""
    return a == b or _normal(a) == _normal(b)


def _normal(condition: sympy.Basic) -> Any:
    if isinstance(condition, sympy.And | sympy.Or):
        parts = sorted(map(_normal, condition.args), key=str)
        return (type(condition).__name__, *parts)
    if isinstance(condition, sympy.Not):
        inner = condition.args[0]
        if isinstance(inner, sympy.And | sympy.Or):
            dual = sympy.Or if isinstance(inner, sympy.And) else sympy.And
            return (dual.__name__, *sorted((_normal(sympy.Not(part)) for part in inner.args), key=str))
        if isinstance(inner, sympy.core.relational.Relational):
            return _normal(inner.negated)
    if isinstance(condition, sympy.Le | sympy.Lt):
        return _normal(condition.reversed)
    if isinstance(condition, sympy.Ge | sympy.Gt):
        difference = sympy.expand(condition.lhs - condition.rhs)
        if isinstance(condition, sympy.Gt) and difference.is_integer:
            return ("Ge", difference - 1)
        return ("Gt" if isinstance(condition, sympy.Gt) else "Ge", difference)
    if isinstance(condition, sympy.Eq | sympy.Ne):
        difference = sympy.expand(condition.lhs - condition.rhs)
        return (type(condition).__name__, *sorted((difference, sympy.expand(-difference)), key=str))
    return condition
