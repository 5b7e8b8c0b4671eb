"""Interpret integer, boolean and mask tensors of a graph as formulas of their indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import attribute, dtype_of, shape_of, value_of
from subquad.ir.mask import Table
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize import mask_factories, mask_parts, mask_pointwise, mask_sums, mask_views  # noqa: F401
from subquad.passes.recognize.constant_tensor import read_constant
from subquad.passes.recognize.mask_bounds import Bounds
from subquad.passes.recognize.mask_choice import NoFormula
from subquad.passes.recognize.mask_rules import RULES, Operation
from subquad.passes.recognize.mask_writes import written_nodes
from subquad.passes.recognize.symbolic_tensor import SymbolicTensor, axis, is_one, number, size_of

Node = torch.fx.Node
LARGEST_FORMULA = 400
"""Parts of a formula; what would be longer is read as a table."""


class MaskAlgebra:
    """Formulas of a graph's tensors, each computed once.

    A formula equals its tensor at every index, for every size and every input; integers that are inputs are taken to stay
    within `mask_bounds.GIVEN`, positions below 2^20.  What has no rule, and what may overflow, becomes a table: an
    uninterpreted function of the tensor's own indices, which is always true and costs only precision.  So does a tensor
    whose memory some operation of the graph writes to.  `tables` maps each function's name to its node; the function's
    `bound` is the largest magnitude that an element can have.
    """

    def __init__(self, module: torch.fx.GraphModule, tensors: Mapping[Node, torch.Tensor] | None = None) -> None:
        self.module = module
        self.tensors = dict(tensors or {})
        self.tables: dict[str, Table] = {}
        self._known: dict[Node, SymbolicTensor] = {}
        self._written = written_nodes(module.graph)
        self._bounds = Bounds(self._constant, self._written)

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

    read = formula

    def _operands(self, node: Node) -> list[Node]:
        if kind(node) not in RULES or node in self._written:
            return []
        found = []
        for operand in node.all_input_nodes:
            if shape_of(operand) is not None:
                found.append(operand)
            elif isinstance(value_of(operand), list | tuple):
                found.extend(n for n in operand.all_input_nodes if shape_of(n) is not None)
        return found

    def _interpret(self, node: Node) -> SymbolicTensor:
        shape = shape_of(node)
        if shape is None:
            raise TypeError(f"{node.name} is not a tensor")
        if node in self._written:
            return self._table(node, shape)
        constant = self._constant(node)
        if constant is not None:
            found = read_constant(constant)
            return self._table(node, shape) if found is None else SymbolicTensor(found, shape)
        rule = RULES.get(kind(node))
        expression: sympy.Basic | None = None
        if rule is not None:
            try:
                dtype = dtype_of(node)
                assert dtype is not None
                expression = rule(Operation(self, node, kind(node), arguments(node), shape, dtype))
            except (NoFormula, KeyError, TypeError, ValueError, IndexError, NotImplementedError):
                expression = None
        if expression is None or not _is_short(expression):
            return self._table(node, shape)
        return SymbolicTensor(expression, shape)

    def _constant(self, node: Node) -> torch.Tensor | None:
        if node in self.tensors:
            return self.tensors[node]
        if node.op == "get_attr":
            value = attribute(self.module, str(node.target))
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                return value
        return None

    def as_table(self, node: Node) -> SymbolicTensor:
        """The tensor as a table of its own elements, whatever its formula is."""
        return self._table(node, shape_of(node) or ())

    def _table(self, node: Node, shape: tuple[Any, ...]) -> SymbolicTensor:
        name = node.name
        self.tables[name] = Table(name, node, len(shape))
        indices = tuple(sympy.S.Zero if is_one(size) else axis(n) for n, size in enumerate(shape))
        bound = self._bounds.of(node)
        if bound <= 1 << 63:
            function = sympy.Function(name, integer=True, bound=bound)
        else:  # floats, and integers that int64 does not hold
            function = sympy.Function(name, real=True)
        expression: sympy.Basic = function(*indices) if indices else function(sympy.S.Zero)
        if dtype_of(node) == torch.bool:
            expression = sympy.Ne(expression, 0)
        return SymbolicTensor(expression, shape)

    def element(self, value: Any, shape: tuple[Any, ...]) -> sympy.Basic:
        """The element formula of an argument (node or Python scalar) broadcast to `shape`."""
        if isinstance(value, Node):
            if not isinstance(value_of(value), torch.Tensor):
                return size_of(value_of(value))
            return self.formula(value).broadcast(shape)
        if isinstance(value, torch.SymInt):
            return size_of(value)
        return number(value)

    def size(self, value: Any) -> sympy.Basic:
        """An integer argument (int, SymInt or a node that holds one) as an expression."""
        return size_of(value_of(value)) if isinstance(value, Node) else size_of(value)


def _is_short(expression: sympy.Basic) -> bool:
    stack, met = [expression], 0
    while stack:
        met += 1
        if met > LARGEST_FORMULA:
            return False
        stack.extend(stack.pop().args)
    return True
