"""What the terms of a mask predicate say of causality, of padding and of shifts."""

from __future__ import annotations

import ast
from collections.abc import Collection

Linear = tuple[int, int, int]


def implies_causal(mask: str) -> bool:
    """True when some conjunct of the predicate is a linear comparison that implies kv <= q."""
    return any(
        (found := _difference(term)) is not None and found[0] > 0 and found[1] < found[0] for term in _terms(mask)
    )


def unpadded(mask: str, padding: Collection[str]) -> str | None:
    """The mask where every token is real: without the terms that the tables `padding` (t0, ...), all ones, make true.

    None when nothing is left.
    """
    return _joined([term for term in _terms(mask) if not _true_of_ones(term, padding)])


def behind(mask: str | None) -> str | None:
    """What the mask still asks of a query that comes after all of the keys; None for nothing."""
    if mask is None:
        return None
    return _joined([t for t in _terms(mask) if (found := _difference(t)) is None or found[0] <= 0 or sum(found) < 0])


def moves_along(mask: str | None) -> bool:
    """True when the mask depends on q - kv alone, so that it stays when both count from another column."""
    return mask is None or all(_difference(term) is not None for term in _terms(mask))


def _terms(mask: str) -> list[ast.expr]:
    return _conjuncts(ast.parse(mask, mode="eval").body)


def _joined(terms: list[ast.expr]) -> str | None:
    return " & ".join(f"({ast.unparse(term)})" for term in terms) or None


def _conjuncts(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitAnd):
        return _conjuncts(tree.left) + _conjuncts(tree.right)
    return [tree]


def _difference(term: ast.expr) -> tuple[int, int] | None:
    """(a, c) of a term that says a * (q - kv) + c >= 0 of whole numbers."""
    if not isinstance(term, ast.Compare) or len(term.ops) != 1:
        return None
    left, right = _linear(term.left), _linear(term.comparators[0])
    if left is None or right is None:
        return None
    a, b, c = (x - y for x, y in zip(left, right, strict=True))
    if isinstance(term.ops[0], (ast.LtE, ast.Lt)):
        a, b, c = -a, -b, -c
    if isinstance(term.ops[0], (ast.Lt, ast.Gt)):
        c -= 1
    elif not isinstance(term.ops[0], (ast.LtE, ast.GtE)):
        return None
    return (a, c) if a == -b else None


def _linear(tree: ast.expr) -> Linear | None:
    """Coefficients of q and kv, and the constant."""
    if isinstance(tree, ast.Name):
        return {"q": (1, 0, 0), "kv": (0, 1, 0)}.get(tree.id)
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return 0, 0, tree.value
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        inner = _linear(tree.operand)
        return None if inner is None else (-inner[0], -inner[1], -inner[2])
    if isinstance(tree, ast.BinOp):
        left, right = _linear(tree.left), _linear(tree.right)
        if left is None or right is None:
            return None
        if isinstance(tree.op, (ast.Add, ast.Sub)):
            sign = 1 if isinstance(tree.op, ast.Add) else -1
            return left[0] + sign * right[0], left[1] + sign * right[1], left[2] + sign * right[2]
        if isinstance(tree.op, ast.Mult) and (left[:2] == (0, 0) or right[:2] == (0, 0)):
            factor, other = (left[2], right) if left[:2] == (0, 0) else (right[2], left)
            return factor * other[0], factor * other[1], factor * other[2]
    return None


def _true_of_ones(term: ast.expr, tables: Collection[str]) -> bool:
    """Whether a term reads only these tables, compared with numbers, and holds where they are 1."""
    if isinstance(term, ast.Subscript):
        return isinstance(term.value, ast.Name) and term.value.id in tables
    if not isinstance(term, ast.Compare) or len(term.ops) != 1 or not _true_of_ones(term.left, tables):
        return False
    bound = term.comparators[0]
    if not isinstance(bound, ast.Constant) or not isinstance(bound.value, (int, float)):
        return False
    checks = {ast.NotEq: bound.value != 1, ast.Eq: bound.value == 1, ast.Gt: bound.value < 1, ast.GtE: bound.value <= 1}
    return checks.get(type(term.ops[0]), False)
