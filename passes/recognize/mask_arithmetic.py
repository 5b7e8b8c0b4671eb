"""What is exact in which dtype: arithmetic and comparisons of leaves, done as the tensor's own operation does them.

Numbers are computed by running the operation itself on one element of each tensor's dtype.  Formulas of indices and tables
are integers; what may overflow, by the bounds of the tables, is no formula.  float32 and float64 hold formulas of indices below
2^24.  A table's element may round in them; then only a comparison with a small number is exact, because rounding keeps the
order and small integers do not round.  Narrower integers wrap around and half precision rounds at 256, so there only numbers
and a tensor's own elements are formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch.fx.node import map_arg

from subquad.ir.graph import dtype_of, rank_of, value_of
from subquad.ir.mask import FloorDiv
from subquad.passes.recognize.mask_bounds import POSITIONS
from subquad.passes.recognize.mask_choice import NoFormula
from subquad.passes.recognize.mask_relation import negate, never_negative, python_number, reads, relate

Node = torch.fx.Node

WIDE_INTEGERS = (torch.int64, torch.int32)
WIDE_FLOATS = (torch.float64, torch.float32)
SMALL = 1 << 20
"""Integers up to here, and four times as far, are exact in the wide floats."""
EXACT_FLOAT = 1 << 24
LARGEST_DIVISOR = 1024
LAST = (1 << 63) - 1


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


def stored(value: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
    """A number as a tensor of this dtype holds it; raises NoFormula when it does not fit."""
    plain = python_number(value)
    if not dtype.is_floating_point:
        if isinstance(plain, float) and not math.isfinite(plain):
            raise NoFormula
        if dtype == torch.bool:
            return sympy.Integer(int(plain != 0))
        limits = torch.iinfo(dtype)
        if not limits.min <= plain <= limits.max:
            raise NoFormula
        return sympy.Integer(int(plain))
    try:
        return number(torch.tensor(plain, dtype=torch.float64).to(dtype).item())
    except (OverflowError, RuntimeError):
        raise NoFormula from None


def is_index(value: sympy.Basic) -> bool:
    """True for an integer formula of indices and sizes alone, below 2^24 for positions below 2^20."""
    return _is_linear(value) and largest(value) <= EXACT_FLOAT


def _is_linear(value: sympy.Basic) -> bool:
    if value.is_Integer:
        return True
    if value.is_Symbol:
        return bool(value.is_integer)
    if isinstance(value, sympy.Add | FloorDiv | sympy.Mod | sympy.Abs | sympy.Max | sympy.Min):
        return all(_is_linear(part) for part in value.args)
    if isinstance(value, sympy.Mul):
        rest = [part for part in value.args if not part.is_Integer]
        return len(rest) == 1 and _is_linear(rest[0])
    return False


def is_integer(value: sympy.Basic) -> bool:
    """True for a formula whose every part is an integer; a table of floats is not."""
    return bool(value.is_integer) and all(element.is_integer for element in reads(value))


def near_element(value: sympy.Basic) -> bool:
    """True for ± one integer table's element plus a small number."""
    constant, rest = value.as_coeff_Add()
    element = -rest if rest.could_extract_minus_sign() else rest
    return bool(
        isinstance(element, AppliedUndef) and element.is_integer and constant.is_Integer and abs(constant) <= SMALL
    )


def largest(value: sympy.Basic) -> float:
    """A bound on the magnitude of an integer formula, from those of its tables, for indices and sizes below 2^20."""
    if value.is_number:
        return abs(python_number(value))
    if value.is_Symbol:
        return POSITIONS
    if isinstance(value, AppliedUndef):
        return getattr(value.func, "bound", math.inf)  # type: ignore[no-any-return]
    parts = [largest(part) for part in value.args]
    if isinstance(value, sympy.Add):
        return sum(parts)
    if isinstance(value, sympy.Mul):
        return math.prod(parts)
    if isinstance(value, FloorDiv):
        return parts[0] + 1
    if isinstance(value, sympy.Mod):
        return parts[1]
    return max(parts) if isinstance(value, sympy.Abs | sympy.Max | sympy.Min) else math.inf


def kept(value: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
    """The leaf as a tensor of this dtype holds it.

    Raises NoFormula when the dtype may round it or wrap it around.
    """
    if value.is_number:
        return stored(value, dtype)
    if not is_integer(value):
        raise NoFormula
    if dtype in WIDE_INTEGERS and largest(value) <= torch.iinfo(dtype).max:
        return value
    if dtype in WIDE_FLOATS and (is_index(value) or near_element(value)):
        return value
    raise NoFormula


ABSORBING = 1e30
"""Integers below 2^45 are less than half a unit in the last place of numbers beyond this, in float64 too."""


def absorbs(number: sympy.Basic, other: sympy.Basic, dtype: torch.dtype) -> bool:
    """True when adding an integer formula leaves a number as it is, because it is so far from zero."""
    small = is_integer(other) and largest(other) < 1 << 45
    return bool(small and dtype in WIDE_FLOATS and number.is_finite and abs(python_number(number)) >= ABSORBING)


def compared(relation: str, a: sympy.Basic, b: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
    """The comparison of two leaves in the dtype that both are converted to.

    Raises NoFormula when the conversion, or the normal form's own arithmetic, may change the answer.
    """
    if not (is_integer(a) or a.is_number) or not (is_integer(b) or b.is_number):
        raise NoFormula
    given = a, b
    a, b = (stored(side, dtype) if side.is_number else side for side in (a, b))
    if dtype.is_floating_point:
        _require_exact(relation, (a, b), given, dtype)
    found = relate(relation, a, b)
    if not all(_is_evaluable(part) for condition in (found, negate(found)) for part in condition.atoms(Relational)):
        raise NoFormula
    return found


def _is_evaluable(comparison: sympy.Basic) -> bool:
    """True when no side of a comparison overflows int64 where it is computed; a table's own element never does."""
    if isinstance(comparison, sympy.Eq | sympy.Ne):
        return True  # sides that lie less than 2^64 apart are equal exactly where their remainders are
    return all(isinstance(side, AppliedUndef) or largest(side) <= LAST for side in comparison.args)


def _require_exact(
    relation: str, sides: tuple[sympy.Basic, sympy.Basic], given: tuple[sympy.Basic, sympy.Basic], dtype: torch.dtype
) -> None:
    if dtype not in WIDE_FLOATS and relate(relation, *sides) != relate(relation, *given):
        raise NoFormula  # some devices compare half precision with a number that they do not round
    for side, other in (sides, sides[::-1]):
        if side.is_number or (dtype in WIDE_FLOATS and is_index(side)):
            continue
        if dtype not in WIDE_FLOATS or not near_element(side) or not other.is_number:
            raise NoFormula
        plain = python_number(other)
        if math.isfinite(plain) and abs(plain) > 4 * SMALL:
            raise NoFormula


def common_dtype(values: tuple[Any, ...]) -> torch.dtype:
    """The dtype in which an operation compares its arguments (nodes and Python numbers)."""
    return torch.result_type(*(_proxy(value) for value in values))  # type: ignore[no-any-return]


def _proxy(value: Any) -> Any:
    if not isinstance(value, Node):
        return 0 if isinstance(value, torch.SymInt) else value
    if dtype_of(value) is None:
        return 0
    return torch.zeros((1,) * (rank_of(value) or 0), dtype=dtype_of(value))


def executed(node: Node, values: Mapping[Node, sympy.Basic]) -> sympy.Basic:
    """The node's operation on one element: its tensors hold the given numbers.  Raises NoFormula when it cannot run."""

    def given(argument: Node) -> Any:
        if argument in values:
            dtype = dtype_of(argument)
            plain = python_number(values[argument])
            return torch.full(
                (1,) * (rank_of(argument) or 0), bool(plain) if dtype == torch.bool else plain, dtype=dtype
            )
        recorded = value_of(argument)
        if isinstance(recorded, bool | int | float):
            return recorded
        raise NoFormula

    args, kwargs = map_arg(node.args, given), map_arg(node.kwargs, given)
    if any(isinstance(part, torch.SymInt) for part in (*args, *kwargs.values())):
        raise NoFormula
    try:
        function = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
        result = function(*args, **kwargs)  # type: ignore[operator]
    except (AttributeError, RuntimeError, TypeError, OverflowError, ZeroDivisionError):
        raise NoFormula from None
    if not isinstance(result, torch.Tensor) or result.numel() != 1 or result.dtype != dtype_of(node):
        raise NoFormula
    return number(result.item())


def _absolute(a: sympy.Basic) -> sympy.Basic:
    return a if never_negative(a) else sympy.Abs(a)


def _divided(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    if not (b.is_Symbol or (b.is_Integer and b != 0)):
        raise NoFormula
    return FloorDiv(a, b)


def _remainder(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    if not (b.is_Symbol or (b.is_Integer and b != 0)):
        raise NoFormula
    return sympy.Mod(a, b)


def _fraction(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """a / b, for a rounding that follows: see `rounded_down`."""
    if not (b.is_Integer and 0 < b <= LARGEST_DIVISOR and is_index(a)):
        raise NoFormula
    return a / b


def rounded_down(value: sympy.Basic) -> sympy.Basic:
    """The floor of a fraction of indices.

    A float32 quotient of integers below 2^24 rounds to a whole number only when it is one.
    """
    top, bottom = sympy.fraction(sympy.together(value))
    if not (bottom.is_Integer and 0 < bottom <= LARGEST_DIVISOR and is_index(sympy.expand(top))):
        raise NoFormula
    return FloorDiv(sympy.expand(top), bottom)


OPERATIONS: dict[str, Callable[..., sympy.Basic]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "rsub": lambda a, b: b - a, "floordiv": _divided, "mod": _remainder, "abs": _absolute,
    "maximum": sympy.Max, "minimum": sympy.Min, "fraction": _fraction,
}  # fmt: skip
