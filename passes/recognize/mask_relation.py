"""Conditions in normal form: comparisons of integer formulas, their conjunctions, disjunctions and negations."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence

import sympy
from sympy.core.function import AppliedUndef

from subquad.ir.mask import FloorDiv

Python = int | float
MOST_COMPARED = 8

COMPARE: dict[str, Callable[[Python, Python], bool]] = {
    "le": operator.le, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
_SWAPPED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}


def python_number(value: sympy.Basic) -> Python:
    """A sympy number as a Python number, integers exactly."""
    return int(value) if value.is_Integer else float(value)


def truth(value: bool) -> sympy.Basic:
    """A Python truth value as a sympy one."""
    return sympy.true if value else sympy.false


def relate(relation: str, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """The condition `a relation b` ("le", "lt", "ge", "gt", "eq", "ne") between numbers and integer formulas.

    Numbers compare as numbers.  A formula against a fraction or an infinity becomes a comparison of integers.  Absolute
    values, minima and maxima become comparisons of what is inside; what has one truth for all indices is decided.  The
    normal form moves every term to the side where it is positive and makes strict comparisons non-strict, so that equal
    conditions are equal expressions.
    """
    if a.is_number and b.is_number:
        return truth(COMPARE[relation](python_number(a), python_number(b)))
    if a.is_number:
        return relate(_SWAPPED[relation], b, a)
    if b.is_number and not b.is_Integer:
        return _against_fraction(relation, a, float(b))
    if relation in ("eq", "ne"):
        equal = _equal(a, b)
        return equal if relation == "eq" else negate(equal)
    if relation in ("le", "lt"):
        a, b = b, a
    return _at_least(a, b + 1 if relation in ("lt", "gt") else b)


def _against_fraction(relation: str, a: sympy.Basic, b: float) -> sympy.Basic:
    if math.isnan(b) or relation in ("eq", "ne"):
        return truth(relation == "ne")
    if math.isinf(b):
        return truth((b < 0) == (relation in ("ge", "gt")))
    if relation in ("ge", "lt"):
        return relate(relation, a, sympy.Integer(math.ceil(b)))
    return relate(relation, a, sympy.Integer(math.floor(b)))


def _at_least(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """a >= b."""
    if isinstance(a, sympy.Abs):
        return disjoin(_at_least(a.args[0], b), _at_least(-a.args[0], b))
    if isinstance(b, sympy.Abs):
        return conjoin(_at_least(a, b.args[0]), _at_least(a, -b.args[0]))
    for side, inside in ((a, 0), (b, 1)):
        if isinstance(side, sympy.Max | sympy.Min):
            parts = [_at_least(part, b) if inside == 0 else _at_least(a, part) for part in side.args]
            return (disjoin if isinstance(side, sympy.Max) == (inside == 0) else conjoin)(*parts)
    difference = sympy.expand(a - b)
    if difference.is_Integer:
        return truth(difference >= 0)
    if never_negative(difference):
        return sympy.true
    if never_negative(-1 - difference):
        return sympy.false
    positive, negative, constant = _sides(difference)
    if positive == 0:
        return sympy.Le(negative, constant)
    if reads(negative) and negative != 0 and not reads(positive):
        return sympy.Ge(positive + constant, negative)
    return sympy.Ge(positive, negative - constant)


def _equal(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    if isinstance(a, sympy.Abs | sympy.Max | sympy.Min) or isinstance(b, sympy.Abs | sympy.Max | sympy.Min):
        return conjoin(_at_least(a, b), _at_least(b, a))
    difference = sympy.expand(a - b)
    if difference.is_Integer:
        return truth(difference == 0)
    if isinstance(difference, sympy.Mul):
        return disjoin(*(_equal(factor, sympy.S.Zero) for factor in difference.args if not factor.is_number))
    if isinstance(difference, sympy.Pow) and difference.exp.is_Integer and difference.exp > 0:
        return _equal(difference.base, sympy.S.Zero)
    if never_negative(difference - 1) or never_negative(-1 - difference):
        return sympy.false
    multiple = difference if isinstance(difference, sympy.Mod) else -difference
    if isinstance(multiple, sympy.Mod) and multiple.args[0].could_extract_minus_sign():
        return _equal(sympy.Mod(sympy.expand(-multiple.args[0]), multiple.args[1]), sympy.S.Zero)
    positive, negative, constant = _sides(difference)
    if positive == 0 or (negative != 0 and str(positive) < str(negative)):
        positive, negative, constant = negative, positive, -constant
    return sympy.Eq(positive, negative - constant)


def _sides(difference: sympy.Basic) -> tuple[sympy.Basic, sympy.Basic, sympy.Basic]:
    """(p, n, c) with difference = p - n + c, where the terms of p and n have positive factors and c is an integer."""
    constant, rest = difference.as_coeff_Add()
    terms = sympy.Add.make_args(rest)
    positive = [term for term in terms if not term.could_extract_minus_sign()]
    negative = [-term for term in terms if term.could_extract_minus_sign()]
    return sympy.Add(*positive), sympy.Add(*negative), constant


def never_negative(expression: sympy.Basic) -> bool:
    """True when a formula is at least zero for every index and size: a sum of terms that cannot be negative."""
    return all(_term_never_negative(term) for term in sympy.Add.make_args(expression))


def _term_never_negative(term: sympy.Basic) -> bool:
    if term.is_number:
        return bool(term.is_Integer) and term >= 0
    if isinstance(term, sympy.Mul):
        return all(_term_never_negative(factor) for factor in term.args)
    if term.is_Symbol:
        return bool(term.is_nonnegative)
    if isinstance(term, FloorDiv):
        return _counts(term.args[1]) and never_negative(term.args[0])
    if isinstance(term, sympy.Mod):
        return _counts(term.args[1])
    if isinstance(term, sympy.Max):
        return any(never_negative(part) for part in term.args)
    if isinstance(term, sympy.Min):
        return all(never_negative(part) for part in term.args)
    return isinstance(term, sympy.Abs)


def _counts(divisor: sympy.Basic) -> bool:
    """True for a divisor that is positive wherever the division is defined."""
    return bool(divisor > 0) if divisor.is_Integer else bool(divisor.is_Symbol and divisor.is_nonnegative)


def conjoin(*conditions: sympy.Basic) -> sympy.Basic:
    """All of the conditions; comparisons that others imply are left out."""
    parts = [p for c in conditions for p in (c.args if isinstance(c, sympy.And) else (c,))]
    if sympy.false in parts or _any_pair(parts, excludes):
        return sympy.false
    possible = _possible(parts)
    if possible != parts:
        return conjoin(*possible)
    return sympy.And(*_independent(parts, lambda dropped, stays: implies(stays, dropped)))


def _possible(parts: list[sympy.Basic]) -> list[sympy.Basic]:
    """The conditions without alternatives that another one rules out: a & (not a | b) is a & b."""
    if len(parts) > MOST_COMPARED:
        return parts
    certain = [part for part in parts if not isinstance(part, sympy.Or)]
    return [
        disjoin(*(choice for choice in part.args if not any(_rules_out(known, choice) for known in certain)))
        if isinstance(part, sympy.Or)
        else part
        for part in parts
    ]


def _rules_out(known: sympy.Basic, choice: sympy.Basic) -> bool:
    needed = choice.args if isinstance(choice, sympy.And) else (choice,)
    return any(sympy.Not(part) == known or excludes(known, part) for part in needed)


def disjoin(*conditions: sympy.Basic) -> sympy.Basic:
    """Any of the conditions, with what all of them require taken out in front; comparisons that imply others left out."""
    parts = [p for c in conditions for p in (c.args if isinstance(c, sympy.Or) else (c,)) if p != sympy.false]
    if sympy.true in parts or _any_pair(parts, covers):
        return sympy.true
    parts = _independent(parts, implies)
    sets = [set(c.args) if isinstance(c, sympy.And) else {c} for c in parts]
    shared = set.intersection(*sets) if len(sets) > 1 else set()
    if not shared:
        return sympy.Or(*parts)
    return sympy.And(*shared, sympy.Or(*(sympy.And(*(s - shared)) for s in sets)))


def _independent(
    parts: Sequence[sympy.Basic], superfluous: Callable[[sympy.Basic, sympy.Basic], bool]
) -> list[sympy.Basic]:
    """The parts without those that are superfluous beside another one."""
    kept = list(dict.fromkeys(parts))
    if len(kept) > MOST_COMPARED:
        return kept
    for part in list(kept):
        if any(other is not part and superfluous(part, other) for other in kept):
            kept.remove(part)
    return kept


def _any_pair(parts: Sequence[sympy.Basic], relation: Callable[[sympy.Basic, sympy.Basic], bool]) -> bool:
    pairs = itertools.combinations(dict.fromkeys(parts), 2)
    return len(parts) <= MOST_COMPARED and any(relation(a, b) for a, b in pairs)


def excludes(first: sympy.Basic, second: sympy.Basic) -> bool:
    """True when two comparisons never hold together."""
    return any(never_negative(sympy.expand(-1 - one - other)) for one in _margins(first) for other in _margins(second))


def covers(first: sympy.Basic, second: sympy.Basic) -> bool:
    """True when at least one of two comparisons always holds."""
    if isinstance(first, sympy.Eq) or isinstance(second, sympy.Eq):
        return False
    return any(never_negative(sympy.expand(one + other + 1)) for one in _margins(first) for other in _margins(second))


def within(condition: sympy.Basic, highest: Mapping[sympy.Symbol, sympy.Basic]) -> sympy.Basic:
    """The condition with comparisons decided that hold or fail for all indices up to `highest`."""
    if isinstance(condition, sympy.And | sympy.Or):
        join = conjoin if isinstance(condition, sympy.And) else disjoin
        return join(*(within(part, highest) for part in condition.args))
    margins = [] if isinstance(condition, sympy.Eq) else _margins(condition)
    for margin in margins:
        met = margin.free_symbols & set(highest)
        factors = {index: sympy.expand(margin).coeff(index) for index in met}
        rest = sympy.expand(margin - sympy.Add(*(factor * index for index, factor in factors.items())))
        falling = all(factor.is_Integer and factor <= 0 for factor in factors.values())
        if falling and not rest.free_symbols & met and never_negative(sympy.expand(margin.xreplace(dict(highest)))):
            return sympy.true
    return condition


def implies(first: sympy.Basic, second: sympy.Basic) -> bool:
    """True when the first comparison, where it holds, makes the second one hold; False when that is not seen."""
    if first == second:
        return True
    if isinstance(second, sympy.Eq | sympy.Ne):
        return False
    ours, theirs = _margins(first), _margins(second)
    return bool(theirs) and any(never_negative(sympy.expand(theirs[0] - margin)) for margin in ours)


def _margins(condition: sympy.Basic) -> list[sympy.Basic]:
    """Formulas that are at least zero where the comparison holds."""
    if isinstance(condition, sympy.Ge):
        return [condition.lhs - condition.rhs]
    if isinstance(condition, sympy.Le):
        return [condition.rhs - condition.lhs]
    if isinstance(condition, sympy.Eq):
        return [condition.lhs - condition.rhs, condition.rhs - condition.lhs]
    return []


def negate(condition: sympy.Basic) -> sympy.Basic:
    """The opposite, with negation pushed inwards as far as it goes."""
    if isinstance(condition, sympy.And):
        return disjoin(*(negate(part) for part in condition.args))
    if isinstance(condition, sympy.Or):
        return conjoin(*(negate(part) for part in condition.args))
    if isinstance(condition, sympy.Not):
        return condition.args[0]
    if isinstance(condition, sympy.Ge):
        return _at_least(condition.rhs - 1, condition.lhs)
    if isinstance(condition, sympy.Le):
        return _at_least(condition.lhs, condition.rhs + 1)
    return sympy.Not(condition)


def either(condition: sympy.Basic, yes: sympy.Basic, no: sympy.Basic) -> sympy.Basic:
    """`yes` where the condition holds, `no` elsewhere; all three are conditions."""
    if yes == no:
        return yes
    if yes == sympy.true:
        return disjoin(condition, no)
    if yes == sympy.false:
        return conjoin(negate(condition), no)
    if no == sympy.true:
        return disjoin(negate(condition), yes)
    if no == sympy.false:
        return conjoin(condition, yes)
    return disjoin(conjoin(condition, yes), conjoin(negate(condition), no))


def reads(expression: sympy.Basic) -> set[sympy.Basic]:
    """The tables' elements that a formula reads."""
    return set(expression.atoms(AppliedUndef))
