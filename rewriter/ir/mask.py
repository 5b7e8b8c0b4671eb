"""The mask of an attention site as a symbolic predicate over (batch, head, query, key) indices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
from sympy.logic.boolalg import Boolean

EmptyRows = Literal["zero", "mean", "nan"]
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


@dataclass(frozen=True)
class Table:
    """A tensor that the predicate reads: `name` is the sympy function's name, `node` the graph node that computes it.

    `axes` is its rank; a table indexed by both q and kv is dense and makes the mask opaque.
    """

    name: str
    node: Any = field(compare=False)
    axes: int = 0


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees.

    predicate: sympy boolean over b, h, q, kv, size symbols and tables; None when nothing could be proved (opaque), and
    then the site keeps the additive or boolean tensor `tensor` as it is.
    empty_rows: the value of a row that sees no key: "zero" (SDPA), "mean" (finite fill), "nan" (-inf without guard).
    evidence: sentences saying where the predicate was read and how it was cross-checked.
    """

    predicate: Boolean | None
    tables: tuple[Table, ...] = ()
    empty_rows: EmptyRows = "zero"
    tensor: Any = field(default=None, compare=False)
    evidence: tuple[str, ...] = ()

    @property
    def is_opaque(self) -> bool:
        """True when the mask is only known as a tensor."""
        return self.predicate is None

    @property
    def is_full(self) -> bool:
        """True when every query sees every key."""
        return self.predicate is sympy.true or self.predicate == sympy.true

    @property
    def family(self) -> str:
        """The field's name for the predicate: full, causal, window(8), padding(attention_mask), and conjunctions."""
        if self.predicate is None:
            return "opaque"
        if self.is_full:
            return "full"
        parts = sorted((_family(part) for part in _conjuncts(self.predicate)), key=_family_order)
        return " & ".join(parts)

    def text(self) -> str | None:
        """The predicate in the operators' expression language; None for a full or opaque mask.

        Tables print as t0, t1, … in the order of `tables`, size symbols as s0, s1, … in the order of `sizes`.
        """
        if self.predicate is None or self.is_full:
            return None
        names = {table.name: f"t{i}" for i, table in enumerate(self.tables)}
        sizes = {symbol: f"s{i}" for i, symbol in enumerate(self.sizes)}
        return print_expression(self.predicate, names, sizes)

    @property
    def sizes(self) -> tuple[sympy.Symbol, ...]:
        """Size symbols that the predicate reads, ordered by name."""
        if self.predicate is None:
            return ()
        free = self.predicate.free_symbols - {B, H, Q, KV}
        return tuple(sorted(free, key=lambda symbol: symbol.name))

    def block(self, q: tuple[int, int], kv: tuple[int, int]) -> str:
        """ "full", "empty" or "partial" for queries q[0]..q[1] and keys kv[0]..kv[1], both ends included.

        Sound: "full" and "empty" are proofs; a predicate that interval arithmetic cannot decide is "partial".
        """
        if self.predicate is None:
            return "partial"
        verdict = _interval(self.predicate, {Q: q, KV: kv})
        return {True: "full", False: "empty", None: "partial"}[verdict]

    def json(self) -> dict[str, Any]:
        """The public words of a mask."""
        return {
            "family": self.family,
            "predicate": None if self.predicate is None else print_expression(self.predicate, {}, {}),
            "tables": [table.name for table in self.tables],
            "empty_rows": self.empty_rows,
            "evidence": list(self.evidence),
        }


def _conjuncts(predicate: Boolean) -> tuple[Boolean, ...]:
    return predicate.args if isinstance(predicate, sympy.And) else (predicate,)


_ORDER = ("full", "causal", "window", "chunk", "prefix", "documents", "padding")


def _family_order(name: str) -> tuple[int, str]:
    rank = next((i for i, family in enumerate(_ORDER) if name.startswith(family)), len(_ORDER))
    return rank, name


def _band(part: Boolean) -> tuple[int, sympy.Basic] | None:
    """(+1, c) for q - kv >= c, (-1, c) for q - kv <= c; None for what is not a band."""
    if not isinstance(part, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    left, right = (part.lhs, part.rhs) if isinstance(part, (sympy.Ge, sympy.Gt)) else (part.rhs, part.lhs)
    difference = sympy.expand(left - right) - (1 if isinstance(part, (sympy.Lt, sympy.Gt)) else 0)
    for sign in (1, -1):
        rest = sympy.expand(difference - sign * (Q - KV))
        if not rest.free_symbols & {Q, KV, B, H} and not rest.atoms(sympy.core.function.AppliedUndef):
            return sign, -rest if sign == 1 else rest
    return None


def _table_of(expression: sympy.Basic) -> str | None:
    found = list(expression.atoms(sympy.core.function.AppliedUndef))
    return found[0].func.__name__ if len(found) == 1 else None


def _family(part: Boolean) -> str:
    band = _band(part)
    if band is not None:
        sign, c = band
        if sign == 1:
            return "causal" if c == 0 else f"causal({-c})"
        return f"window({c + 1})"
    if isinstance(part, (sympy.Ne, sympy.core.function.AppliedUndef)):
        name = _table_of(part)
        free = part.free_symbols & {B, H, Q, KV}
        if name and free <= {B, KV} and KV in free:
            return f"padding({name})"
    if isinstance(part, sympy.Eq):
        left, right = part.args
        if left.xreplace({Q: KV}) == right.xreplace({Q: KV}) and left != right:
            chunks = [e for e in left.atoms(FloorDiv) if e.args[1].is_Integer]
            if chunks and not left.atoms(sympy.core.function.AppliedUndef):
                return f"chunk({chunks[0].args[1]})"
            name = next(iter(sorted(f.func.__name__ for f in left.atoms(sympy.core.function.AppliedUndef))), None)
            if name:
                return f"documents({name})"
    return print_expression(part, {}, {})


_RELATIONS = {"Le": "<=", "Lt": "<", "Ge": ">=", "Gt": ">", "Eq": "==", "Ne": "!=", "LessThan": "<=", "StrictLessThan": "<",
              "GreaterThan": ">=", "StrictGreaterThan": ">", "Equality": "==", "Unequality": "!="}  # fmt: skip


def print_expression(e: sympy.Basic, tables: dict[str, str], sizes: dict[sympy.Symbol, str]) -> str:
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
        if isinstance(x, sympy.core.function.AppliedUndef):
            name = x.func.__name__
            return f"{tables.get(name, name)}[{', '.join(go(a) for a in x.args)}]"
        if isinstance(x, sympy.core.relational.Relational):
            return f"({go(x.lhs)} {_RELATIONS[type(x).__name__]} {go(x.rhs)})"
        if isinstance(x, (sympy.And, sympy.Or)):
            glue = " & " if isinstance(x, sympy.And) else " | "
            return "(" + glue.join(sorted(go(a) for a in x.args)) + ")"
        if isinstance(x, sympy.Not):
            return f"~{go(x.args[0])}"
        if isinstance(x, FloorDiv):
            return f"({go(x.args[0])} // {go(x.args[1])})"
        if isinstance(x, sympy.Mod):
            return f"({go(x.args[0])} % {go(x.args[1])})"
        if isinstance(x, sympy.Abs):
            return f"abs({go(x.args[0])})"
        if isinstance(x, Where):
            return f"where({', '.join(go(a) for a in x.args)})"
        if isinstance(x, sympy.Add):
            return "(" + " + ".join(go(a) for a in x.args) + ")"
        if isinstance(x, sympy.Mul):
            return "(" + " * ".join(go(a) for a in x.args) + ")"
        if isinstance(x, (sympy.Min, sympy.Max)):
            name = "min" if isinstance(x, sympy.Min) else "max"
            text = go(x.args[0])
            for a in x.args[1:]:
                text = f"{name}({text}, {go(a)})"
            return text
        raise ValueError(f"a mask predicate uses {x}, which the expression language lacks.")

    return go(e)


def _bounds(e: sympy.Basic, box: dict[sympy.Symbol, tuple[int, int]]) -> tuple[int, int] | None:
    if e.is_Integer:
        return int(e), int(e)
    if e in box:
        return box[e]
    parts = [_bounds(a, box) for a in e.args]
    if not parts or any(p is None for p in parts):
        return None
    ranges: list[tuple[int, int]] = [p for p in parts if p is not None]
    if isinstance(e, sympy.Add):
        return sum(lo for lo, _ in ranges), sum(hi for _, hi in ranges)
    if isinstance(e, sympy.Mul):
        lo, hi = ranges[0]
        for a, c in ranges[1:]:
            corners = (lo * a, lo * c, hi * a, hi * c)
            lo, hi = min(corners), max(corners)
        return lo, hi
    if isinstance(e, FloorDiv) and ranges[1][0] == ranges[1][1] > 0:
        return ranges[0][0] // ranges[1][0], ranges[0][1] // ranges[1][0]
    if isinstance(e, sympy.Abs):
        lo, hi = ranges[0]
        return (0 if lo <= 0 <= hi else min(abs(lo), abs(hi))), max(abs(lo), abs(hi))
    return None


def _interval(p: sympy.Basic, box: dict[sympy.Symbol, tuple[int, int]]) -> bool | None:
    """The truth of a predicate over a whole box of indices: True, False, or None when it varies or is unknown."""
    if p == sympy.true or p == sympy.false:
        return bool(p)
    if isinstance(p, sympy.Not):
        inner = _interval(p.args[0], box)
        return None if inner is None else not inner
    if isinstance(p, (sympy.And, sympy.Or)):
        absorbing = isinstance(p, sympy.Or)
        verdicts = [_interval(a, box) for a in p.args]
        if absorbing in verdicts:
            return absorbing
        return None if None in verdicts else not absorbing
    if isinstance(p, sympy.core.relational.Relational):
        difference = _bounds(sympy.expand(p.lhs - p.rhs), box)
        sides = _bounds(p.lhs, box), _bounds(p.rhs, box)
        if difference is None and sides[0] is not None and sides[1] is not None:
            difference = sides[0][0] - sides[1][1], sides[0][1] - sides[1][0]
        if difference is None:
            return None
        lo, hi = difference
        if isinstance(p, (sympy.Le, sympy.Lt)):
            return _sign(hi <= 0, lo > 0) if isinstance(p, sympy.Le) else _sign(hi < 0, lo >= 0)
        if isinstance(p, (sympy.Ge, sympy.Gt)):
            return _sign(lo >= 0, hi < 0) if isinstance(p, sympy.Ge) else _sign(lo > 0, hi <= 0)
        equal = _sign(lo == hi == 0, lo > 0 or hi < 0)
        if isinstance(p, sympy.Eq):
            return equal
        return None if equal is None else not equal
    return None


def _sign(always: bool, never: bool) -> bool | None:
    return True if always else False if never else None
