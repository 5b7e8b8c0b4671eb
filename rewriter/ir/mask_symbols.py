"""The symbols and functions that mask predicates are made of."""

from __future__ import annotations

import sympy

B, H, Q, KV = sympy.symbols("b h q kv", integer=True, nonnegative=True)


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """Integer division rounding down, as Python's `//`."""

    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic | None:
        if b == 1:
            return a
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) // int(b))
        return None


class Where(sympy.Function):  # type: ignore[misc]
    """`Where(condition, a, b)`: a where the condition holds, b elsewhere."""

    @classmethod
    def eval(cls, condition: sympy.Basic, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic | None:
        if condition == sympy.true or a == b:
            return a
        if condition == sympy.false:
            return b
        return None
