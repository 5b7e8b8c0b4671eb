"""Interpret integer, boolean and mask tensors of a graph as formulas of their indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import attribute, dtype_of, shape_of, value_of
from subquad.ir.mask import Table, Where
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.constant_tensor import read_constant
from subquad.passes.recognize.symbolic_tensor import (
    SymbolicTensor,
    as_condition,
    as_number,
    axis,
    combine,
    compare,
    is_boolean,
    is_one,
    number,
    size_of,
    substitute,
)

Node = torch.fx.Node


class MaskAlgebra:
    """Formulas of a graph's tensors, each computed once.

    What has no rule becomes a table: an uninterpreted function of the tensor's own indices, which is always true and
    costs only precision.  `tables` maps each function's name to its node.
    """

    def __init__(self, module: torch.fx.GraphModule, tensors: Mapping[Node, torch.Tensor] | None = None) -> None:
        self.module = module
        self.tensors = dict(tensors or {})
        self.tables: dict[str, Table] = {}
        self._known: dict[Node, SymbolicTensor] = {}

    def formula(self, node: Node) -> SymbolicTensor:
        """The formula of a tensor node; raises TypeError when the node holds no tensor."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._known:
                pending.pop()
                continue
            missing = [n for n in self._operands(current) if n not in self._known]
            if missing:
                pending.extend(missing)
                continue
            self._known[current] = self._interpret(current)
            pending.pop()
        return self._known[node]

    def _operands(self, node: Node) -> list[Node]:
        if kind(node) not in RULES:
            return []
        return [n for n in node.all_input_nodes if shape_of(n) is not None]

    def _interpret(self, node: Node) -> SymbolicTensor:
        shape = shape_of(node)
        if shape is None:
            raise TypeError(f"{node.name} is not a tensor")
        constant = self._constant(node)
        if constant is not None:
            found = read_constant(constant)
            if found is not None:
                return SymbolicTensor(found, shape)
            return self._table(node, shape)
        rule = RULES.get(kind(node))
        if rule is not None and self._is_exact(node):
            try:
                expression = rule(self, node, arguments(node), shape)
            except (KeyError, TypeError, ValueError, IndexError, NotImplementedError):
                expression = None
            if expression is not None and expression is not sympy.nan:
                return SymbolicTensor(expression, shape)
        return self._table(node, shape)

    def _is_exact(self, node: Node) -> bool:
        """Arithmetic of floats rounds; only comparisons, choices and copies of them are formulas."""
        dtype = dtype_of(node)
        if dtype is None or not dtype.is_floating_point or kind(node) not in ("add", "sub", "mul", "div", "rsub"):
            return True
        return all(
            self._known[n].expression.is_number or isinstance(self._known[n].expression, Where)
            for n in node.all_input_nodes
            if n in self._known
        )

    def _constant(self, node: Node) -> torch.Tensor | None:
        if node in self.tensors:
            return self.tensors[node]
        if node.op == "get_attr":
            value = attribute(self.module, str(node.target))
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                return value
        return None

    def _table(self, node: Node, shape: tuple[Any, ...]) -> SymbolicTensor:
        name = node.name
        self.tables[name] = Table(name, node, len(shape))
        indices = tuple(sympy.S.Zero if is_one(size) else axis(n) for n, size in enumerate(shape))
        function = sympy.Function(name, integer=True)
        expression: sympy.Basic = function(*indices) if indices else function(sympy.S.Zero)
        if dtype_of(node) == torch.bool:
            expression = sympy.Ne(expression, 0)
        return SymbolicTensor(expression, shape)

    def element(self, value: Any, shape: tuple[Any, ...]) -> sympy.Basic:
        """The element formula of an argument (node or Python scalar) broadcast to `shape`."""
        if isinstance(value, Node):
            recorded = value_of(value)
            if not isinstance(recorded, torch.Tensor):
                return size_of(recorded)
            return self._known[value].broadcast(shape)
        if isinstance(value, torch.SymInt):
            return size_of(value)
        return number(value)

    def size(self, value: Any) -> sympy.Basic:
        """An integer argument (int, SymInt or a node that holds one) as an expression."""
        return size_of(value_of(value)) if isinstance(value, Node) else size_of(value)


Rule = Callable[[MaskAlgebra, Node, dict[str, Any], tuple[Any, ...]], sympy.Basic | None]
RULES: dict[str, Rule] = {}


def _rule(*kinds: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in kinds:
            RULES[name] = rule
        return rule

    return register


@_rule("le", "lt", "ge", "gt", "eq", "ne")
def _comparison(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    return compare(kind(node), algebra.element(a["a"], shape), algebra.element(a["b"], shape))


@_rule("add", "sub", "mul", "floordiv", "mod", "div")
def _arithmetic(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    operation = kind(node)
    if operation == "div" and a.get("rounding_mode") == "floor":
        operation = "floordiv"
    elif operation == "div" and a.get("rounding_mode") is not None:
        return None
    left, right = algebra.element(a["a"], shape), algebra.element(a["b"], shape)
    if a.get("alpha", 1) != 1:
        right = combine("mul", number(a["alpha"]), right)
    if dtype_of(node) == torch.bool:
        joined = {"add": sympy.Or, "mul": sympy.And}.get(operation)
        return None if joined is None else joined(as_condition(left), as_condition(right))
    return combine(operation, left, right)


@_rule("rsub")
def _reversed_difference(
    algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]
) -> sympy.Basic | None:
    if a.get("alpha", 1) != 1:
        return None
    return combine("sub", algebra.element(a["b"], shape), algebra.element(a["a"], shape))


@_rule("and", "or")
def _logic(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    if dtype_of(node) != torch.bool:
        return None
    join = sympy.And if kind(node) == "and" else sympy.Or
    return join(as_condition(algebra.element(a["a"], shape)), as_condition(algebra.element(a["b"], shape)))


@_rule("not")
def _negation(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    return sympy.Not(as_condition(algebra.element(a["x"], shape))) if dtype_of(node) == torch.bool else None


@_rule("neg")
def _minus(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    return combine("mul", sympy.S.NegativeOne, algebra.element(a["x"], shape))


@_rule("abs")
def _magnitude(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    inner = as_number(algebra.element(a["x"], shape))
    return None if isinstance(inner, Where) else sympy.Abs(inner)


@_rule("where")
def _choice(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    condition = as_condition(algebra.element(a["cond"], shape))
    return Where(condition, as_number(algebra.element(a["a"], shape)), as_number(algebra.element(a["b"], shape)))


@_rule("masked_fill")
def _fill(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    condition = as_condition(algebra.element(a["mask"], shape))
    value, base = algebra.element(a["value"], shape), algebra.element(a["x"], shape)
    if is_boolean(base):
        filled = as_condition(value)
        return sympy.Or(sympy.And(condition, filled), sympy.And(sympy.Not(condition), base))
    return Where(condition, as_number(value), base)


@_rule("arange")
def _arange(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    return algebra.size(a["start"]) + algebra.size(a["step"]) * axis(0)


@_rule("full", "new_full", "full_like", "scalar_tensor")
def _filled(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    value = algebra.element(a["value"], shape)
    return as_condition(value) if dtype_of(node) == torch.bool else as_number(value)


@_rule("ones", "new_ones", "ones_like")
def _ones(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    return sympy.true if dtype_of(node) == torch.bool else sympy.S.One


@_rule("zeros", "new_zeros", "zeros_like")
def _zeros(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    return sympy.false if dtype_of(node) == torch.bool else sympy.S.Zero


@_rule("tril", "triu")
def _triangle(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    rows, columns = axis(len(shape) - 2), axis(len(shape) - 1)
    diagonal = algebra.size(a["diagonal"])
    if kind(node) == "tril":
        kept = compare("le", columns, rows + diagonal)
    else:
        kept = compare("ge", columns, rows + diagonal)
    base = algebra.element(a["x"], shape)
    return sympy.And(kept, base) if is_boolean(base) else Where(kept, base, sympy.S.Zero)


@_rule("cumsum")
def _running_sum(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    along = axis(a["dim"] % len(shape))
    base = as_number(algebra.element(a["x"], shape))
    return None if along in base.free_symbols else base * (along + 1)


@_rule("diff")
def _difference(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    if a["n"] != 1 or a["append"] is not None or a["prepend"] is None:
        return None
    base, before = algebra._known[a["x"]], algebra._known[a["prepend"]]
    along = a["dim"] % len(shape)
    if not is_one(before.shape[along]):
        return None
    here = axis(along)
    inside = as_number(base.expression) - substitute(as_number(base.expression), {here: here - 1})
    first = substitute(as_number(base.expression), {here: sympy.S.Zero}) - as_number(before.expression)
    inside, first = sympy.expand(inside), sympy.expand(first)
    return inside if inside == first else None


@_rule("cast")
def _cast(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic | None:
    base = algebra.element(a["x"], shape)
    target, source = dtype_of(node), dtype_of(a["x"])
    if target == torch.bool:
        return as_condition(base)
    if source is not None and source.is_floating_point and target is not None and not target.is_floating_point:
        return None
    return as_number(base)


@_rule("contiguous")
def _same(algebra: MaskAlgebra, node: Node, a: dict[str, Any], shape: tuple[Any, ...]) -> sympy.Basic:
    return algebra.element(a["x"], shape)
