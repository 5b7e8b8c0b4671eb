"""Prints mask predicates, block tests and feature maps of the expression language as Triton."""

from __future__ import annotations

import ast

from subquad.kernels.expression import parse, table_indices

HELPERS = '''
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
'''
"""Triton functions that printed expressions call; part of every generated file."""

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
    "exp": "tl.exp",
    "sigmoid": "tl.sigmoid",
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


def feature_blocks(texts: tuple[str, ...], x: str, suffix: str, precision: str) -> tuple[list[str], list[str]]:
    """(assignments, names): Triton lines that compute each block phi of tile `x`, products with weights shared
    between blocks.

    Weight wN is the tile wN<suffix>; the real columns of block i are features<i> (a row mask), and the rest come out 0.
    """
    lines: list[str] = []
    products: dict[str, str] = {}
    names = []
    for index, text in enumerate(texts):
        value = _feature(parse(text, "feature").node, x, suffix, precision, f"features{index}", lines, products)
        names.append(f"phi{suffix}{index}")
        lines.append(f"{names[-1]} = tl.where(features{index}, {value}, 0.0)")
    return lines, names


def _feature(
    node: ast.expr, x: str, suffix: str, precision: str, columns: str, lines: list[str], products: dict[str, str]
) -> str:
    def inner(part: ast.expr) -> str:
        return _feature(part, x, suffix, precision, columns, lines, products)

    match node:
        case ast.Name(id="x"):
            return x
        case ast.Constant(value=value):
            return repr(float(value))  # type: ignore[arg-type]
        case ast.BinOp(left=left, op=ast.MatMult(), right=ast.Name(id=name)):
            key = ast.unparse(node)
            if key not in products:
                products[key] = f"u{suffix}{len(products)}"
                lines.append(f'{products[key]} = tl.dot({inner(left)}, {name}{suffix}, input_precision="{precision}")')
            return products[key]
        case ast.UnaryOp(operand=part):
            return f"(-{inner(part)})"
        case ast.BinOp(left=left, op=op, right=right):
            return f"({inner(left)} {_OPERATORS[type(op)]} {inner(right)})"
        case ast.Call(func=ast.Name(id="softmax"), args=[part]):
            return f"row_softmax({inner(part)}, {columns})"
        case ast.Call(func=ast.Name(id="relu"), args=[part]):
            return f"tl.maximum({inner(part)}, 0.0)"
        case ast.Call(func=ast.Name(id=name), args=[part]):
            return f"{_FUNCTIONS[name]}({inner(part)})"
    raise ValueError(f"The feature expression part {ast.unparse(node)!r} has no Triton form.")
