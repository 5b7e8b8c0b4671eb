"""Prints mask predicates, block tests and feature maps of the expression language as Triton."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from subquad.kernels.expression import parse, table_indices

MASK_HELPERS = '''
@triton.jit
def floor_div(a, b):
    """a // b rounded down, as Python does; Triton's // rounds toward zero."""
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def floor_mod(a, b):
    """a % b with the sign of b, as Python does."""
    return a - floor_div(a, b) * b


@triton.jit
def bit(x, n):
    """Bit n of the 64 bits of x; 0 for any other n."""
    inside = (n >= 0) & (n < 64)
    return tl.where(inside, (x.to(tl.int64) >> tl.where(inside, n, 0).to(tl.int64)) & 1, 0)
'''
"""Triton functions that printed mask predicates call."""

FEATURE_HELPERS = '''
@triton.jit
def row_softmax(x, columns):
    """softmax over the real columns of x; 0 elsewhere."""
    x = tl.where(columns, x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def tanh(x):
    """tanh by one exponential, exact at both infinities."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def softplus(x):
    """log(1 + e^x) without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
'''
"""Triton functions that printed feature maps and score modifiers call."""

_OPERATORS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.BitAnd: "&", ast.BitOr: "|",
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip
_FUNCTIONS = {
    "min": "tl.minimum",
    "max": "tl.maximum",
    "where": "tl.where",
    "abs": "tl.abs",
    "bit": "bit",
}


def predicate(text: str, names: dict[str, str], grammar: str = "mask") -> str:
    """The mask or block test as one Triton expression; `names` renames the indices, table tN is read through tN_ptr."""
    return _boolean(parse(text, grammar).node, names)


def ranks(text: str | None) -> list[int]:
    """How many indices each table t0, t1, ... of a mask is read with (0 for a table that is not read)."""
    if text is None:
        return []
    expression = parse(text)
    found = [0] * expression.indices("t")
    for node in ast.walk(expression.node):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            found[int(node.value.id[1:])] = len(table_indices(node.slice))
    return found


def scalar_count(text: str | None) -> int:
    """How many scalars s0, s1, ... a mask reads."""
    return 0 if text is None else parse(text).indices("s")


def _boolean(node: ast.expr, names: dict[str, str]) -> str:
    printed = _print(node, names)
    return f"({printed} != 0)" if isinstance(node, ast.Subscript | ast.Call) else printed


def _print(node: ast.expr, names: dict[str, str]) -> str:
    match node:
        case ast.Constant(value=value):
            return repr(value)
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Subscript(value=ast.Name(id=name), slice=index):
            return _load(name, [_print(part, names) for part in table_indices(index)])
        case ast.UnaryOp(op=ast.Invert(), operand=inner):
            return f"({_boolean(inner, names)} == 0)"
        case ast.UnaryOp(operand=inner):
            return f"(-{_print(inner, names)})"
        case ast.BinOp(left=left, op=ast.FloorDiv() | ast.Mod() as op, right=right):
            helper = "floor_div" if isinstance(op, ast.FloorDiv) else "floor_mod"
            return f"{helper}({_print(left, names)}, {_print(right, names)})"
        case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr() as op, right=right):
            return f"({_boolean(left, names)} {_OPERATORS[type(op)]} {_boolean(right, names)})"
        case ast.BinOp(left=left, op=op, right=right):
            return f"({_print(left, names)} {_OPERATORS[type(op)]} {_print(right, names)})"
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return f"({_print(left, names)} {_OPERATORS[type(op)]} {_print(right, names)})"
        case ast.Call(func=ast.Name(id="where"), args=[condition, yes, no]):
            return f"tl.where({_boolean(condition, names)}, {_print(yes, names)}, {_print(no, names)})"
        case ast.Call(func=ast.Name(id=name), args=args):
            return f"{_FUNCTIONS[name]}({', '.join(_print(argument, names) for argument in args)})"
    raise ValueError(f"The expression part {ast.unparse(node)!r} has no Triton form.")


def _load(name: str, indices: list[str]) -> str:
    place = " + ".join(f"({index}) * {name}_stride{axis}" for axis, index in enumerate(indices))
    inside = " & ".join(f"(({index}) >= 0) & (({index}) < {name}_size{axis})" for axis, index in enumerate(indices))
    return f"tl.load({name}_ptr + {place}, mask=({inside}) != 0, other=0)"


def is_rowwise(text: str) -> bool:
    """True for a feature map that needs the whole row of x for one of its columns."""
    return any(
        (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult))
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ROW_FUNCTIONS)
        for node in ast.walk(parse(text, "feature").node)
    )


def printable(text: str) -> bool:
    """True for a feature map that has a Triton form."""
    known = {*_ROW_FUNCTIONS, *_FEATURES} - {"outer"}
    calls = [
        n.func.id
        for n in ast.walk(parse(text, "feature").node)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    return all(name in known for name in calls)


_ROW_FUNCTIONS = ("softmax", "sum", "amax", "outer")
_FEATURES = {
    "exp": "tl.exp({})",
    "log": "tl.log({})",
    "sqrt": "tl.sqrt({})",
    "tanh": "tanh({})",
    "abs": "tl.abs({})",
    "relu": "tl.maximum({}, 0.0)",
    "sigmoid": "tl.sigmoid({})",
    "softplus": "softplus({})",
}


@dataclass(frozen=True)
class Columns:
    """The columns of a tile: the index vector, and how many are real."""

    index: str
    width: int

    @property
    def real(self) -> str:
        """Mask [1, pad] of the real columns."""
        return f"({self.index} < {self.width})[None, :]"


def print_feature(text: str, suffix: str, precision: str, x: Columns, product: Columns, lines: list[str]) -> str:
    """One Triton expression for a feature map of the tile `x`; wN is the tile wN<suffix>, products with it have the
    columns `product`. Products are first assigned by appended `lines`, so that each is computed once.

    Raises ValueError for what has no Triton form.
    """
    products: dict[str, str] = {}

    def visit(node: ast.expr) -> tuple[str, Columns]:
        match node:
            case ast.Name(id="x"):
                return "x", x
            case ast.Constant(value=value):
                return repr(float(value)), x  # type: ignore[arg-type]
            case ast.BinOp(left=left, op=ast.MatMult(), right=ast.Name(id=name)):
                key = ast.unparse(node)
                if key not in products:
                    products[key] = f"u{len(products)}"
                    lines.append(
                        f'{products[key]} = tl.dot({visit(left)[0]}, {name}{suffix}, input_precision="{precision}")'
                    )
                return products[key], product
            case ast.UnaryOp(operand=part):
                inner, columns = visit(part)
                return f"(-{inner})", columns
            case ast.BinOp(left=left, op=op, right=right):
                (a, columns), (b, others) = visit(left), visit(right)
                return f"({a} {_OPERATORS[type(op)]} {b})", others if isinstance(left, ast.Constant) else columns
            case ast.Call(func=ast.Name(id="softmax"), args=[part]):
                inner, columns = visit(part)
                return f"row_softmax({inner}, {columns.real})", columns
            case ast.Call(func=ast.Name(id="sum"), args=[part]):
                inner, columns = visit(part)
                return f"tl.sum(tl.where({columns.real}, {inner}, 0.0), axis=1)[:, None]", columns
            case ast.Call(func=ast.Name(id="amax"), args=[part]):
                inner, columns = visit(part)
                return f'tl.max(tl.where({columns.real}, {inner}, float("-inf")), axis=1)[:, None]', columns
            case ast.Call(func=ast.Name(id=name), args=[part]) if name in _FEATURES:
                inner, columns = visit(part)
                return _FEATURES[name].format(inner), columns
        raise ValueError(f"The feature expression part {ast.unparse(node)!r} has no Triton form.")

    return visit(parse(text, "feature").node)[0]
