"""Divide and reduce numbers written in mixed radix: (a·n + b) // n → a and (a·n + b) % n → b where 0 ≤ b < n."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import sympy
from torch.utils._sympy.functions import FloorDiv as SizeDiv

from subquad.ir.mask import FloorDiv

Sizes = Mapping[sympy.Symbol, sympy.Basic]


def without_divisions(expression: sympy.Basic, sizes: Sizes) -> sympy.Basic:
    """The same number with every division that the ranges of its digits decide carried out.

    sizes: for each digit d the size n of its range, 0 ≤ d < n.
    """
    if not expression.atoms(FloorDiv, sympy.Mod):
        return expression
    return _undivided(expression, tuple(sizes.items()))


@lru_cache(maxsize=4096)
def _undivided(expression: sympy.Basic, sizes: tuple[tuple[sympy.Symbol, sympy.Basic], ...]) -> sympy.Basic:
    if not expression.atoms(FloorDiv, sympy.Mod):
        return expression
    named = {size: _name(size) for size in expression.atoms(SizeDiv)}
    named.update({part: _name(part) for _, size in sizes for part in size.atoms(SizeDiv)})
    if named:
        plain = tuple((digit, size.xreplace(named)) for digit, size in sizes)
        return _undivided(expression.xreplace(named), plain).xreplace({v: k for k, v in named.items()})
    changed = expression.func(*(_undivided(part, sizes) for part in expression.args))
    if isinstance(changed, FloorDiv | sympy.Mod):
        number, by = changed.args
        quotient, rest = quotient_and_rest(number, by, dict(sizes))
        return quotient if isinstance(changed, FloorDiv) else rest
    return _put_together(changed) if isinstance(changed, sympy.Add) else changed


def _put_together(total: sympy.Basic) -> sympy.Basic:
    """c·n·(x // n) + c·(x % n) → c·x."""
    for part in total.atoms(sympy.Mod):
        number, by = part.args
        factor, whole = total.coeff(part), FloorDiv(number, by)
        if factor != 0 and sympy.expand(total.coeff(whole) - factor * by) == 0:
            return _put_together(sympy.expand(total - factor * part - factor * by * whole + factor * number))
    return total


def _name(size: sympy.Basic) -> sympy.Symbol:
    """A name for a size that is itself a quotient of sizes."""
    return sympy.Symbol(f"({size})", integer=True, positive=True)


def quotient_and_rest(number: sympy.Basic, by: sympy.Basic, sizes: Sizes) -> tuple[sympy.Basic, sympy.Basic]:
    """(number // by, number % by) for a positive `by`, with as few divisions left as the digits' ranges allow."""
    whole, rest = _multiples(number, by)
    if rest == 0 or _below(rest, by, sizes):
        return whole, rest
    for term in sympy.Add.make_args(rest):
        scale = term.as_independent(*sizes, as_Add=False)[0]
        if scale == 1 or not scale.is_positive or not _is_whole(by / scale):
            continue
        high, low = _multiples(rest, scale)
        if low == 0 or _below(low, scale, sizes):
            quotient, remainder = quotient_and_rest(high, by / scale, sizes)
            return whole + quotient, sympy.expand(scale * remainder) + low
    return whole + FloorDiv(rest, by), sympy.Mod(rest, by)


def _multiples(number: sympy.Basic, by: sympy.Basic) -> tuple[sympy.Basic, sympy.Basic]:
    """number = by · first + second, with every term in the first that `by` divides."""
    whole: list[sympy.Basic] = []
    rest: list[sympy.Basic] = []
    for term in sympy.Add.make_args(sympy.expand(number)):
        quotient = term / by
        (whole if _is_whole(quotient) else rest).append(quotient if _is_whole(quotient) else term)
    return sympy.Add(*whole), sympy.Add(*rest)


def _is_whole(quotient: sympy.Basic) -> bool:
    return bool(quotient.is_integer) and bool(quotient.is_polynomial())


def _below(number: sympy.Basic, bound: sympy.Basic, sizes: Sizes) -> bool:
    highest = _highest(number, sizes)
    return highest is not None and bool(sympy.expand(bound - 1 - highest).is_nonnegative)


def _highest(number: sympy.Basic, sizes: Sizes) -> sympy.Basic | None:
    """The largest value of a sum of digits times sizes; None when the number is not known to be one."""
    total: sympy.Basic = sympy.S.Zero
    for term in sympy.Add.make_args(number):
        scale, variable = term.as_independent(*sizes, as_Add=False)
        if not scale.is_nonnegative:
            return None
        largest: sympy.Basic | None = sympy.S.One
        if variable in sizes:
            largest = sizes[variable] - 1
        elif isinstance(variable, FloorDiv):
            inner = _highest(variable.args[0], sizes)
            largest = None if inner is None else FloorDiv(inner, variable.args[1])
        elif isinstance(variable, sympy.Mod):
            largest = variable.args[1] - 1
        elif variable != 1:
            largest = None
        if largest is None:
            return None
        total = total + scale * largest
    return total
