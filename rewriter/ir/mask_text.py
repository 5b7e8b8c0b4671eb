"""Prints a mask predicate in the operators' expression language."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.core.function import AppliedUndef
from torch.utils._sympy import functions as sizes_of_torch

from subquad.ir.mask_symbols import FloorDiv, Where

_RELATIONS = {
    sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!=",
}  # fmt: skip
_QUOTIENTS = (FloorDiv, sizes_of_torch.FloorDiv, sizes_of_torch.CleanDiv)
_ROUNDED = (sizes_of_torch.CeilToInt, sizes_of_torch.FloorToInt, sizes_of_torch.TruncToInt)
_REMAINDERS = (sympy.Mod, sizes_of_torch.Mod, sizes_of_torch.PythonMod)
_EXTREMES = {
    sympy.Min: "min", sympy.Max: "max", sizes_of_torch.Min: "min", sizes_of_torch.Max: "max",
}  # fmt: skip


def print_expression(e: sympy.Basic, tables: Mapping[str, str], sizes: Mapping[sympy.Symbol, str]) -> str:
    """Print a predicate in the operators' expression language (Python syntax).

    tables and sizes rename; a name that is absent keeps its own.  Raises ValueError for what the language lacks.
    """

    def go(x: sympy.Basic) -> str:
        if x == sympy.true or x == sympy.false:
            return "True" if x == sympy.true else "False"
        if isinstance(x, sympy.Symbol):
            return sizes.get(x, x.name)
        if x.is_Integer:
            return str(int(x))
        if isinstance(x, AppliedUndef):
            name = x.func.__name__
            return f"{tables.get(name, name)}[{', '.join(go(a) for a in x.args)}]"
        if isinstance(x, sympy.core.relational.Relational):
            return f"({go(x.lhs)} {_RELATIONS[x.func]} {go(x.rhs)})"
        if isinstance(x, sympy.And | sympy.Or):
            glue = " & " if isinstance(x, sympy.And) else " | "
            return "(" + glue.join(sorted(go(a) for a in x.args)) + ")"
        if isinstance(x, sympy.Not):
            return f"~{go(x.args[0])}"
        if isinstance(x, _QUOTIENTS):
            return f"({go(x.args[0])} // {go(x.args[1])})"
        if isinstance(x, _ROUNDED) and isinstance(x.args[0], sizes_of_torch.IntTrueDiv):
            above, below = x.args[0].args  # sizes, so that rounding down and rounding towards zero are one
            return go(FloorDiv(above + below - 1 if x.func is sizes_of_torch.CeilToInt else above, below))
        if isinstance(x, _REMAINDERS):
            return f"({go(x.args[0])} % {go(x.args[1])})"
        if isinstance(x, sympy.Abs):
            return f"abs({go(x.args[0])})"
        if isinstance(x, Where):
            return f"where({', '.join(go(a) for a in x.args)})"
        if isinstance(x, sympy.Add):
            return _sum(x)
        if isinstance(x, sympy.Mul):
            return "(" + " * ".join(go(a) for a in x.args) + ")"
        if isinstance(x, sympy.Pow) and x.exp.is_Integer and 0 < x.exp <= 8:
            return "(" + " * ".join([go(x.base)] * int(x.exp)) + ")"
        if x.func in _EXTREMES:
            text = go(x.args[0])
            for a in x.args[1:]:
                text = f"{_EXTREMES[x.func]}({text}, {go(a)})"
            return text
        raise ValueError(f"a mask predicate uses {x}, which the expression language lacks.")

    def _sum(x: sympy.Basic) -> str:
        constant, rest = x.as_coeff_Add()
        terms = sorted(sympy.Add.make_args(rest), key=lambda term: (term.could_extract_minus_sign(), go(term)))
        text = go(terms[0])
        for term in terms[1:]:
            text += f" - {go(-term)}" if term.could_extract_minus_sign() else f" + {go(term)}"
        if constant != 0:
            text += f" - {go(-constant)}" if constant < 0 else f" + {go(constant)}"
        return f"({text})"

    return go(e)
