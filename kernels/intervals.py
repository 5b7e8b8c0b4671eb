"""Derives block tests (can any pair be visible, are all pairs visible) from a mask predicate by interval arithmetic."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass

from subquad.kernels.expression import parse, table_indices

_TRUE, _FALSE = ast.Constant(True), ast.Constant(False)


@dataclass(frozen=True)
class _Range:
    """Bounds of an integer expression over a block; None is unbounded."""

    low: ast.expr | None
    high: ast.expr | None

    @property
    def is_point(self) -> bool:
        return self.low is not None and self.low is self.high


_ANYTHING = _Range(None, None)


@functools.lru_cache(maxsize=4096)
def block_tests(text: str) -> tuple[str, str]:
    """Return (maybe, always), two expressions of the "test" grammar over q_lo, q_hi, kv_lo, kv_hi, i_lo .. j_hi (inclusive
    bounds), b, h, s0.., t0[..].

    Sound: where `maybe` is False no (q, kv) of the block satisfies `text`; where `always` is True all of them do. A
    table read at an index that varies inside the block is unknown.
    """
    maybe, always = _predicate(parse(text).node)
    return ast.unparse(maybe), ast.unparse(always)


def _name(text: str) -> ast.expr:
    return ast.Name(text)


def _binary(op: ast.operator, left: ast.expr, right: ast.expr) -> ast.expr:
    node = ast.BinOp(left, op, right)
    values = [_literal(left), _literal(right)]
    if None not in values and not (isinstance(op, ast.FloorDiv | ast.Mod) and values[1] == 0):
        return ast.Constant(
            eval(compile(ast.fix_missing_locations(ast.Expression(node)), "fold", "eval"), {"__builtins__": {}})
        )
    if isinstance(op, ast.Add | ast.Sub) and values[1] == 0:
        return left
    if isinstance(op, ast.Add) and values[0] == 0:
        return right
    return node


def _literal(node: ast.expr) -> int | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    return None


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    texts = {ast.unparse(argument) for argument in arguments}
    if name in ("min", "max") and len(texts) == 1:
        return arguments[0]
    values = [_literal(argument) for argument in arguments]
    if name in ("min", "max") and None not in values:
        return ast.Constant((min if name == "min" else max)(values))  # type: ignore[type-var]
    return ast.Call(_name(name), list(arguments), [])


def _compare(op: ast.cmpop, left: ast.expr | None, right: ast.expr | None, unknown: ast.expr) -> ast.expr:
    return unknown if left is None or right is None else ast.Compare(left, [op], [right])


def _and(left: ast.expr, right: ast.expr) -> ast.expr:
    return _junction(ast.BitAnd(), left, right, absorbing=False)


def _or(left: ast.expr, right: ast.expr) -> ast.expr:
    return _junction(ast.BitOr(), left, right, absorbing=True)


def _junction(op: ast.operator, left: ast.expr, right: ast.expr, absorbing: bool) -> ast.expr:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, ast.Constant):
            return one if one.value is absorbing else other
    return left if ast.unparse(left) == ast.unparse(right) else ast.BinOp(left, op, right)


def _not(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Constant):
        return _FALSE if node.value else _TRUE
    return ast.UnaryOp(ast.Invert(), node)


def _predicate(node: ast.expr) -> tuple[ast.expr, ast.expr]:
    match node:
        case ast.Constant():
            return node, node
        case ast.Subscript() | ast.Call():
            return (node, node) if _range(node).is_point else (_TRUE, _FALSE)
        case ast.UnaryOp(operand=inner):
            maybe, always = _predicate(inner)
            return _not(always), _not(maybe)
        case ast.BinOp(left=left, op=op, right=right):
            (m1, a1), (m2, a2) = _predicate(left), _predicate(right)
            return (_and(m1, m2), _and(a1, a2)) if isinstance(op, ast.BitAnd) else (_or(m1, m2), _or(a1, a2))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _comparison(op, _range(left), _range(right))
    raise ValueError(f"The mask expression contains {ast.unparse(node)!r} where a predicate is needed.")


def _comparison(op: ast.cmpop, left: _Range, right: _Range) -> tuple[ast.expr, ast.expr]:
    if isinstance(op, ast.Gt | ast.GtE):
        maybe, always = _compare(op, left.high, right.low, _TRUE), _compare(op, left.low, right.high, _FALSE)
        return maybe, always
    if isinstance(op, ast.Lt | ast.LtE):
        return _compare(op, left.low, right.high, _TRUE), _compare(op, left.high, right.low, _FALSE)
    if left.is_point and right.is_point:
        same = _compare(ast.Eq(), left.low, right.low, _TRUE)
        meet = same
    else:
        meet = _and(_compare(ast.LtE(), left.low, right.high, _TRUE), _compare(ast.LtE(), right.low, left.high, _TRUE))
        same = _and(_compare(ast.Eq(), left.low, right.high, _FALSE), _compare(ast.Eq(), left.high, right.low, _FALSE))
    return (meet, same) if isinstance(op, ast.Eq) else (_not(same), _not(meet))


def _range(node: ast.expr) -> _Range:
    match node:
        case ast.Name(id="q" | "kv" | "i" | "j" as name):
            return _Range(_name(f"{name}_lo"), _name(f"{name}_hi"))
        case ast.Constant() | ast.Name():
            return _Range(node, node)
        case ast.Subscript(slice=index):
            fixed = all(_range(part).is_point for part in table_indices(index))
            return _Range(node, node) if fixed else _ANYTHING
        case ast.UnaryOp(operand=inner):
            return _negate(_range(inner))
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, _range(left), _range(right))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _function(name, args)
    raise ValueError(f"The mask expression contains {ast.unparse(node)!r} where a number is needed.")


def _point(node: ast.expr) -> _Range:
    return _Range(node, node)


def _minus(node: ast.expr | None) -> ast.expr | None:
    if node is None:
        return None
    value = _literal(node)
    return ast.Constant(-value) if value is not None else ast.UnaryOp(ast.USub(), node)


def _negate(inner: _Range) -> _Range:
    if inner.is_point:
        low = _minus(inner.low)
        return _Range(low, low)
    return _Range(_minus(inner.high), _minus(inner.low))


def _arithmetic(op: ast.operator, left: _Range, right: _Range) -> _Range:
    if left.is_point and right.is_point:
        assert left.low is not None
        assert right.low is not None
        return _point(_binary(op, left.low, right.low))
    if isinstance(op, ast.Add):
        return _Range(_apply(op, left.low, right.low), _apply(op, left.high, right.high))
    if isinstance(op, ast.Sub):
        return _Range(_apply(op, left.low, right.high), _apply(op, left.high, right.low))
    if isinstance(op, ast.Mult):
        return _product(left, right)
    if not right.is_point or left.low is None or left.high is None or right.low is None:
        return _ANYTHING
    divisor = right.low
    first, last = _binary(ast.FloorDiv(), left.low, divisor), _binary(ast.FloorDiv(), left.high, divisor)
    if isinstance(op, ast.FloorDiv):
        return _ends(first, last, _sign(divisor))
    one_period = ast.Compare(first, [ast.Eq()], [last])
    lowest = _call("min", ast.Constant(0), _binary(ast.Add(), divisor, ast.Constant(1)))
    highest = _call("max", ast.Constant(0), _binary(ast.Sub(), divisor, ast.Constant(1)))
    return _Range(
        _call("where", one_period, _binary(op, left.low, divisor), lowest),
        _call("where", one_period, _binary(op, left.high, divisor), highest),
    )


def _apply(op: ast.operator, left: ast.expr | None, right: ast.expr | None) -> ast.expr | None:
    return None if left is None or right is None else _binary(op, left, right)


def _sign(node: ast.expr) -> int:
    value = _literal(node)
    return 0 if value is None else (1 if value >= 0 else -1)


def _ends(first: ast.expr, last: ast.expr, sign: int) -> _Range:
    if sign:
        return _Range(first, last) if sign > 0 else _Range(last, first)
    return _Range(_call("min", first, last), _call("max", first, last))


def _product(left: _Range, right: _Range) -> _Range:
    if left.is_point:
        left, right = right, left
    if left.low is None or left.high is None or right.low is None or right.high is None:
        return _ANYTHING
    times = ast.Mult()
    if right.is_point:
        return _ends(_binary(times, left.low, right.low), _binary(times, left.high, right.low), _sign(right.low))
    corners = [_binary(times, a, c) for a in (left.low, left.high) for c in (right.low, right.high)]
    return _Range(
        functools.reduce(lambda a, c: _call("min", a, c), corners),
        functools.reduce(lambda a, c: _call("max", a, c), corners),
    )


def _function(name: str, args: list[ast.expr]) -> _Range:
    if name == "where":
        maybe, always = _predicate(args[0])
        yes, no = _range(args[1]), _range(args[2])
        return _Range(_choice("min", maybe, always, yes.low, no.low), _choice("max", maybe, always, yes.high, no.high))
    parts = [_range(argument) for argument in args]
    if all(part.is_point for part in parts):
        return _point(ast.Call(_name(name), [part.low for part in parts if part.low is not None], []))
    if name == "bit":
        return _Range(ast.Constant(0), ast.Constant(1))
    if name == "abs":
        low, high = parts[0].low, parts[0].high
        if low is None or high is None:
            return _Range(ast.Constant(0), None)
        negated = _minus(high)
        opposite = _minus(low)
        assert negated is not None
        assert opposite is not None
        return _Range(_call("max", _call("max", low, negated), ast.Constant(0)), _call("max", high, opposite))
    lows, highs = [part.low for part in parts], [part.high for part in parts]
    return _Range(_limit(name, lows, drop=name == "max"), _limit(name, highs, drop=name == "min"))


def _limit(name: str, bounds: list[ast.expr | None], drop: bool) -> ast.expr | None:
    known = [bound for bound in bounds if bound is not None]
    if len(known) < len(bounds):
        return known[0] if drop and known else None
    return _call(name, *known)


def _choice(name: str, maybe: ast.expr, always: ast.expr, yes: ast.expr | None, no: ast.expr | None) -> ast.expr | None:
    if yes is None or no is None:
        return None
    return _call("where", always, yes, _call("where", maybe, _call(name, yes, no), no))
