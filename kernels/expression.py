"""Parses, checks and evaluates the expression language of mask predicates and feature maps."""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Value = Any
"""What an expression evaluates to: a tensor, an int, a SymInt, a bool or a float."""

INT, BOOL, REAL, TABLE = "int", "bool", "real", "table"

_INDEX_NAMES = {
    "mask": frozenset({"b", "h", "q", "kv"}),
    "test": frozenset({"b", "h", "q_lo", "q_hi", "kv_lo", "kv_hi"}),
    "feature": frozenset({"x"}),
}
_UNARY = ("abs", "exp", "log", "sqrt", "tanh", "relu", "sigmoid", "softplus", "softmax", "sum", "amax")
_FUNCTIONS = {
    "mask": {"abs": 1, "min": 2, "max": 2, "where": 3},
    "feature": dict.fromkeys(_UNARY, 1) | {"outer": 2},
}
_FUNCTIONS["test"] = _FUNCTIONS["mask"]
_SCALAR, _TABLE, _WEIGHT = re.compile(r"s\d+"), re.compile(r"t\d+"), re.compile(r"w\d+")
_ARITHMETIC: dict[type, Callable[[Value, Value], Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
    ast.MatMult: operator.matmul,
}
_COMPARISONS: dict[type, Callable[[Value, Value], Value]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


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
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC and not isinstance(
                op, ast.MatMult
            ):
                if isinstance(op, ast.Div) != feature and isinstance(op, ast.Div | ast.FloorDiv | ast.Mod):
                    raise self.fail(f"the operator of {ast.unparse(node)!r}")
                self.number(left)
                self.number(right)
                return REAL if feature else INT
            case ast.Compare(left=left, ops=[op], comparators=[right]) if not feature and type(op) in _COMPARISONS:
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
                return REAL if feature else INT
        raise self.fail(repr(ast.unparse(node)))


def table_indices(index: ast.expr) -> list[ast.expr]:
    """The index expressions of a table subscript, one per dimension of the table."""
    return list(index.elts) if isinstance(index, ast.Tuple) else [index]


@functools.lru_cache(maxsize=4096)
def parse(text: str, grammar: str = "mask") -> Expression:
    """Parse and check `text`; a grammar is "mask" (b, h, q, kv, s0.., t0[..]), "test" (block bounds) or "feature" (x,
    w0..).

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


def evaluate(text: str, env: Mapping[str, Value], grammar: str = "mask") -> Value:
    """Value of the expression under `env` (index tensors that broadcast, ints, tables as tensors, weights [.., K, F]).

    A table index outside the table reads as 0 (False); a table without axes is read at index 0. Raises ValueError on a
    missing name or a wrong number of table indices.
    """
    return evaluate_all((text,), env, grammar)[0]


def evaluate_all(texts: Sequence[str], env: Mapping[str, Value], grammar: str = "mask") -> list[Value]:
    """Values of several expressions under one `env`; equal subexpressions are computed once."""
    evaluator = _Evaluator(env)
    values = []
    for text in texts:
        expression = parse(text, grammar)
        value = evaluator(expression.node)
        values.append(value if grammar == "feature" else truth(value))
    return values


def truth(value: Value) -> Value:
    """The value as a boolean: nonzero is True."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.bool else value != 0
    return value if isinstance(value, bool | torch.SymBool) else value != 0


class _Evaluator:
    def __init__(self, env: Mapping[str, Value]) -> None:
        self.env = env
        self.known: dict[str, Value] = {}

    def __call__(self, node: ast.expr) -> Value:
        key = ast.unparse(node)
        if key not in self.known:
            self.known[key] = self.compute(node)
        return self.known[key]

    def read(self, name: str) -> Value:
        if name not in self.env:
            raise ValueError(f"The expression reads {name!r}, which was not given.")
        return self.env[name]

    def compute(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self.read(name)
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                return _gather(name, self.read(name), [self(part) for part in table_indices(index)])
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self(inner)
            case ast.UnaryOp(operand=inner):
                value = truth(self(inner))
                return ~value if isinstance(value, Tensor) else not value
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return truth(self(left)) & truth(self(right))
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return truth(self(left)) | truth(self(right))
            case ast.BinOp(left=left, op=op, right=right):
                return _ARITHMETIC[type(op)](self(left), self(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _COMPARISONS[type(op)](self(left), self(right))
            case ast.Call(func=ast.Name(id=name), args=args):
                return _CALLS[name](*[self(argument) for argument in args])
        raise ValueError(f"The expression contains {ast.unparse(node)!r}, which the language does not have.")


def _tensors(*values: Value) -> list[Tensor]:
    device = next(value.device for value in values if isinstance(value, Tensor))
    return [
        value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=torch.int64, device=device)
        for value in values
    ]


def _extreme(tensor_form: Callable[[Tensor, Tensor], Tensor], plain: Callable[..., Value]) -> Callable[..., Value]:
    def choose(left: Value, right: Value) -> Value:
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            return tensor_form(*_tensors(left, right))
        return plain(left, right)

    return choose


def _where(condition: Value, yes: Value, no: Value) -> Value:
    condition = truth(condition)
    if not isinstance(condition, Tensor):
        return yes if condition else no
    return torch.where(condition, yes, no)


def _gather(name: str, table: Tensor, indices: list[Value]) -> Value:
    table = torch.atleast_1d(table)
    if len(indices) != table.dim():
        raise ValueError(f"Table {name} has {table.dim()} dimensions but is read with {len(indices)} indices.")
    places = [torch.as_tensor(index, dtype=torch.int64, device=table.device) for index in indices]
    inside: Value = True
    for place, size in zip(places, table.shape, strict=True):
        inside = (place >= 0) & (place < size) & inside
    if table.numel() == 0:
        return torch.zeros_like(inside, dtype=table.dtype)
    value = table[tuple(place.clamp(0, size - 1) for place, size in zip(places, table.shape, strict=True))]
    return torch.where(inside, value, torch.zeros_like(value))


_CALLS: dict[str, Callable[..., Value]] = {
    "abs": abs,
    "min": _extreme(torch.minimum, min),
    "max": _extreme(torch.maximum, max),
    "where": _where,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "amax": lambda x: x.amax(-1, keepdim=True),
    "outer": lambda x, y: (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2),
}
