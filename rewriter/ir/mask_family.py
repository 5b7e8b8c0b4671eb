"""The field's names for mask predicates: causal, window, chunk, prefix, documents, padding, and how they are joined."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from subquad.ir.mask_symbols import KV, B, FloorDiv, H, Q
from subquad.ir.mask_text import print_expression

_ORDER = (
    "full",
    "causal",
    "window",
    "dilated",
    "chunk",
    "prefix",
    "documents",
    "padding",
    "lengths",
    "keys",
    "queries",
)
_INDICES = {B, H, Q, KV}


def family_name(predicate: Boolean, labels: Mapping[str, str]) -> str:
    """Names of the predicate's conjuncts joined by " & ", of alternatives by " | "; what has no name is printed.

    padding(t) is exactly t[b, kv] != 0, which passes rely on; other conditions on keys are lengths(t), for kv < t[b], and
    keys(…), conditions on queries queries(…).
    labels: what tables are called, by the name of their function.
    """
    if predicate == sympy.true:
        return "full"
    if isinstance(predicate, sympy.Or):
        return _alternatives(predicate, labels)
    parts = list(predicate.args) if isinstance(predicate, sympy.And) else [predicate]
    names: list[str] = []
    both = _both_sides(parts)
    if both is not None:
        width, sides = both
        names.append(f"window(±{width})")
        parts = [part for part in parts if part not in sides]
    names += [family_name(part, labels) if isinstance(part, sympy.Or) else _name(part, labels) for part in parts]
    names = [f"({name})" if " | " in name else name for name in names]
    return " & ".join(sorted(dict.fromkeys(names), key=_order))


def _order(name: str) -> tuple[int, str]:
    return next((i for i, family in enumerate(_ORDER) if name.startswith(family)), len(_ORDER)), name


def _alternatives(predicate: Boolean, labels: Mapping[str, str]) -> str:
    """A prefix that every query sees beside causal keys is a prefix mask; other alternatives are joined."""
    rest = [part for part in predicate.args if _name(part, labels) != "causal"]
    if len(rest) == 1 and len(predicate.args) == 2:
        limit = _key_limit(rest[0], labels)
        if limit is not None:
            return f"prefix({limit})"
    names = sorted((family_name(part, labels) for part in predicate.args), key=_order)
    return " | ".join(f"({name})" if " & " in name else name for name in names)


def _margin(part: Boolean) -> sympy.Basic | None:
    """m for a comparison m >= 0."""
    if isinstance(part, sympy.Ge | sympy.Gt):
        margin = part.lhs - part.rhs
    elif isinstance(part, sympy.Le | sympy.Lt):
        margin = part.rhs - part.lhs
    else:
        return None
    return sympy.expand(margin - 1 if isinstance(part, sympy.Lt | sympy.Gt) else margin)


def _band(part: Boolean) -> tuple[int, sympy.Basic] | None:
    """(+1, c) for q - kv >= c, (-1, c) for q - kv <= c, where c may read tables of the row; None for what is no band."""
    margin = _margin(part)
    if margin is None:
        return None
    for sign in (1, -1):
        rest = sympy.expand(margin - sign * (Q - KV))
        if not rest.free_symbols & {Q, KV, H}:
            return sign, -rest if sign == 1 else rest
    return None


def _both_sides(parts: list[Boolean]) -> tuple[sympy.Basic, tuple[Boolean, Boolean]] | None:
    """(w, …) for two parts that say |q - kv| <= w."""
    bands = {part: band for part in parts if (band := _band(part)) is not None}
    for low, (sign, c) in bands.items():
        for high, (other, d) in bands.items():
            if sign == 1 and other == -1 and c == -d and d != 0:
                return d, (low, high)
    return None


def _key_limit(part: Boolean, labels: Mapping[str, str]) -> str | None:
    """n for kv < n, the same for all queries."""
    margin = _margin(part)
    if margin is None:
        return None
    limit = sympy.expand(margin + KV + 1)
    return None if limit.free_symbols & {H, Q, KV} else _words(limit, labels)


def _words(expression: sympy.Basic, labels: Mapping[str, str]) -> str:
    if isinstance(expression, AppliedUndef):
        return labels.get(expression.func.__name__, expression.func.__name__)
    return print_expression(expression, labels, {}).removeprefix("(").removesuffix(")")


def _tables(expression: sympy.Basic, labels: Mapping[str, str]) -> list[str]:
    names = sorted({f.func.__name__ for f in expression.atoms(AppliedUndef)})
    return [labels.get(name, name) for name in names]


def _name(part: Boolean, labels: Mapping[str, str]) -> str:
    band = _band(part)
    if band is not None:
        sign, c = band
        if sign == 1:
            return "causal" if c == 0 else f"causal({_words(-c, labels)})"
        return f"window({_words(sympy.expand(c + 1), labels)})"
    read, free = _tables(part, labels), part.free_symbols & _INDICES
    if isinstance(part, sympy.Ne) and part.rhs == 0 and part.lhs.args == (B, KV) and isinstance(part.lhs, AppliedUndef):
        return f"padding({', '.join(read)})"
    if read and free <= {B, KV} and KV in free:
        return f"lengths({', '.join(read)})" if _key_limit(part, labels) else f"keys({_words(part, labels)})"
    if read and free <= {B, Q} and Q in free:
        return f"queries({_words(part, labels)})"
    return _paired(part, labels, read) or print_expression(part, labels, {})


def _paired(part: Boolean, labels: Mapping[str, str], read: list[str]) -> str | None:
    """Names of comparisons between the same formula of the query and of the key."""
    if isinstance(part, sympy.Eq) and isinstance(part.lhs, sympy.Mod) and part.lhs.args[1].is_Integer:
        if not read and not part.lhs.args[0].xreplace({Q: KV}).free_symbols & _INDICES:
            return f"dilated({part.lhs.args[1]})"
    if not isinstance(part, sympy.Eq | sympy.Ge | sympy.Le):
        return None
    left, right = part.args
    if left.xreplace({Q: KV}) != right.xreplace({Q: KV}) or left == right:
        return None
    if not isinstance(part, sympy.Eq):
        above, below = (left, right) if isinstance(part, sympy.Ge) else (right, left)
        later = Q in above.free_symbols and KV in below.free_symbols
        return f"causal by {', '.join(read)}" if read and later else None
    chunks = [e for e in left.atoms(FloorDiv) if e.args[1].is_Integer]
    if chunks:
        return f"chunk({chunks[0].args[1]})"
    return f"documents({', '.join(read)})" if read else None
