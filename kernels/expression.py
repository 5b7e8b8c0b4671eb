"""Parses and checks the expression language of mask predicates and feature maps."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass

INT, BOOL, REAL, TABLE = "int", "bool", "real", "table"

_INDEX_NAMES = {
    "mask": frozenset({"b", "h", "q", "kv", "i", "j"}),
    "test": frozenset({"b", "h"} | {f"{name}_{end}" for name in ("q", "kv", "i", "j") for end in ("lo", "hi")}),
    "feature": frozenset({"x"}),
}
_UNARY = ("abs", "exp", "log", "sqrt", "tanh", "relu", "sigmoid", "softplus", "softmax", "sum", "amax")
_FUNCTIONS = {
    "mask": {"abs": 1, "min": 2, "max": 2, "where": 3, "bit": 2},
    "feature": dict.fromkeys(_UNARY, 1) | {"outer": 2},
}
_FUNCTIONS["test"] = _FUNCTIONS["mask"]
_SCALAR, _TABLE, _WEIGHT = re.compile(r"s\d+"), re.compile(r"t\d+"), re.compile(r"w\d+")
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


@dataclass(frozen=True)
class Expression:
    """A checked expression: its normal text, its tree, the kind of its value and the names it reads."""

    text: str
    node: ast.expr
    kind: str
    names: frozenset[str]

    def indices(self, letter: str) -> int:
        """Smallest count n such that every name letter0..letter(n-1) read by the expression exists."""
        found = [int(name[1:]) for name in self.names if re.fullmatch(letter + r"\d+", name)]
        return max(found, default=-1) + 1


class _Checker:
    def __init__(self, text: str, grammar: str) -> None:
        self.text, self.grammar = text, grammar
        self.names: set[str] = set()

    def fail(self, found: str) -> ValueError:
        return ValueError(
            f"The {self.grammar} expression {self.text!r} contains {found}, which the language does not have."
        )

    def want(self, node: ast.expr, *kinds: str) -> str:
        kind = self.kind(node)
        if kind not in kinds:
            raise self.fail(f"{ast.unparse(node)!r} of kind {kind} where {' or '.join(kinds)} is needed")
        return kind

    def number(self, node: ast.expr) -> str:
        return self.want(node, REAL) if self.grammar == "feature" else self.want(node, INT, TABLE)

    def kind(self, node: ast.expr) -> str:
        feature = self.grammar == "feature"
        match node:
            case ast.Constant(value=bool()) if not feature:
                return BOOL
            case ast.Constant(value=int()) if not isinstance(node.value, bool):
                return REAL if feature else INT
            case ast.Constant(value=float()) if feature:
                return REAL
            case ast.Name(id=name):
                self.names.add(name)
                if name in _INDEX_NAMES[self.grammar]:
                    return REAL if feature else INT
                if not feature and _SCALAR.fullmatch(name):
                    return INT
                if feature and _WEIGHT.fullmatch(name):
                    return REAL
                raise self.fail(f"the name {name!r}")
            case ast.Subscript(value=ast.Name(id=name), slice=index) if not feature and _TABLE.fullmatch(name):
                self.names.add(name)
                for part in table_indices(index):
                    self.number(part)
                return TABLE
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                self.number(inner)
                return REAL if feature else INT
            case ast.UnaryOp(op=ast.Invert(), operand=inner) if not feature:
                self.want(inner, BOOL, TABLE)
                return BOOL
            case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr(), right=right) if not feature:
                self.want(left, BOOL, TABLE)
                self.want(right, BOOL, TABLE)
                return BOOL
            case ast.BinOp(left=left, op=ast.MatMult(), right=ast.Name(id=name)) if feature and _WEIGHT.fullmatch(name):
                self.names.add(name)
                self.number(left)
                return REAL
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC):
                if isinstance(op, ast.Div) != feature and isinstance(op, ast.Div | ast.FloorDiv | ast.Mod):
                    raise self.fail(f"the operator of {ast.unparse(node)!r}")
                self.number(left)
                self.number(right)
                return REAL if feature else INT
            case ast.Compare(left=left, ops=[op], comparators=[right]) if not feature and isinstance(op, _COMPARISONS):
                self.number(left)
                self.number(right)
                return BOOL
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if _FUNCTIONS[self.grammar].get(name) == len(
                args
            ):
                if name == "where":
                    self.want(args[0], BOOL, TABLE)
                    args = args[1:]
                for argument in args:
                    self.number(argument)
                return REAL if feature else TABLE if name == "bit" else INT
        raise self.fail(repr(ast.unparse(node)))


def table_indices(index: ast.expr) -> list[ast.expr]:
    """The index expressions of a table subscript, one per dimension of the table."""
    return list(index.elts) if isinstance(index, ast.Tuple) else [index]


@functools.lru_cache(maxsize=4096)
def parse(text: str, grammar: str = "mask") -> Expression:
    """Parse and check `text`; a grammar is "mask" (b, h, q, kv, i, j, s0.., t0[..]), "test" (bounds of q, kv, i, j over a
    block) or "feature" (x, w0..).

    q and kv are logical positions; i is the row of q and j the slot of the key, counted over all segments. bit(x, n) is
    bit n of the 64 bits of x, 0 for any other n.

    Raises ValueError naming the construct that is not in the language.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"The {grammar} expression {text!r} is not Python syntax: {error.msg}.") from None
    checker = _Checker(text, grammar)
    kind = checker.kind(node)
    if grammar != "feature" and kind == INT:
        raise checker.fail(f"{ast.unparse(node)!r} of kind int where a predicate is needed")
    return Expression(ast.unparse(node), node, kind, frozenset(checker.names))
