"""Evaluates expressions of mask predicates and feature maps on tensors and numbers."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.expression import parse, table_indices

Value = Any
"""What an expression evaluates to: a tensor, an int, a SymInt, a bool or a float."""

Step = Callable[[Mapping[str, Value], dict[str, Value]], Value]
"""step(env, values known so far by text) -> the value of one subexpression."""


def evaluate(text: str, env: Mapping[str, Value], grammar: str = "mask") -> Value:
    """Value of the expression under `env` (index tensors that broadcast, ints, tables as tensors, weights [.., K, F]).

    A table index outside the table reads as 0 (False); a table without axes is read at index 0. Raises ValueError on a
    missing name or a wrong number of table indices.
    """
    return evaluate_all((text,), env, grammar)[0]


def evaluate_all(texts: Sequence[str], env: Mapping[str, Value], grammar: str = "mask") -> list[Value]:
    """Values of several expressions under one `env`; equal subexpressions are computed once."""
    known: dict[str, Value] = {}
    values = [_compiled(text, grammar)(env, known) for text in texts]
    return values if grammar == "feature" else [truth(value) for value in values]


def truth(value: Value) -> Value:
    """The value as a boolean: nonzero is True."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.bool else value != 0
    return value if isinstance(value, bool | torch.SymBool) else value != 0


@functools.lru_cache(maxsize=4096)
def _compiled(text: str, grammar: str) -> Step:
    return _step(parse(text, grammar).node)


def _step(node: ast.expr) -> Step:
    match node:
        case ast.Constant(value=constant):
            return lambda env, known: constant
        case ast.Name(id=name):
            return lambda env, known: _read(env, name)
    key, parts = ast.unparse(node), [_step(part) for part in _parts(node)]
    compute = _computation(node)

    def step(env: Mapping[str, Value], known: dict[str, Value]) -> Value:
        if key not in known:
            known[key] = compute(env, *(part(env, known) for part in parts))
        return known[key]

    return step


def _parts(node: ast.expr) -> list[ast.expr]:
    match node:
        case ast.Subscript(slice=index):
            return table_indices(index)
        case ast.UnaryOp(operand=inner):
            return [inner]
        case ast.BinOp(left=left, right=right) | ast.Compare(left=left, comparators=[right]):
            return [left, right]
        case ast.Call(args=args):
            return args
    raise ValueError(f"The expression contains {ast.unparse(node)!r}, which the language does not have.")


def _computation(node: ast.expr) -> Callable[..., Value]:
    """f(env, *values of the parts) -> the value of the node."""
    match node:
        case ast.Subscript(value=ast.Name(id=name)):
            return lambda env, *places: _gather(name, _read(env, name), places)
        case ast.UnaryOp(op=ast.USub()):
            return lambda env, inner: -inner
        case ast.UnaryOp():
            return lambda env, inner: _negated(truth(inner))
        case ast.BinOp(op=ast.BitAnd()):
            return lambda env, left, right: truth(left) & truth(right)
        case ast.BinOp(op=ast.BitOr()):
            return lambda env, left, right: truth(left) | truth(right)
        case ast.BinOp(op=op) | ast.Compare(ops=[op]):
            combine = _OPERATORS[type(op)]
            return lambda env, left, right: combine(left, right)
        case ast.Call(func=ast.Name(id=name)):
            call = _CALLS[name]
            return lambda env, *arguments: call(*arguments)
    raise ValueError(f"The expression contains {ast.unparse(node)!r}, which the language does not have.")


def _read(env: Mapping[str, Value], name: str) -> Value:
    if name not in env:
        raise ValueError(f"The expression reads {name!r}, which was not given.")
    return env[name]


def _negated(value: Value) -> Value:
    return ~value if isinstance(value, Tensor) else not value


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


def _bit(word: Value, place: Value) -> Value:
    if not isinstance(word, Tensor) and not isinstance(place, Tensor):
        return (word >> place) & 1 if 0 <= place < 64 else 0
    words, places = _tensors(word, place)
    inside = (places >= 0) & (places < 64)
    return torch.where(inside, (words.to(torch.int64) >> places.clamp(0, 63)) & 1, 0)


def _gather(name: str, table: Tensor, indices: Sequence[Value]) -> Value:
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


_OPERATORS: dict[type, Callable[[Value, Value], Value]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Div: operator.truediv, ast.MatMult: operator.matmul,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Value]] = {
    "abs": abs,
    "bit": _bit,
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
