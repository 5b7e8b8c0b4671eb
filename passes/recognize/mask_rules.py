"""The register of the mask algebra's rules, one per kind of operation, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of, shape_of
from subquad.passes.recognize.mask_choice import is_boolean, spread
from subquad.passes.recognize.mask_relation import within
from subquad.passes.recognize.symbolic_tensor import SymbolicTensor, as_condition, as_number, axis, size_of

Node = torch.fx.Node


class Formulas(Protocol):
    """What rules ask of the algebra that calls them."""

    def element(self, value: Any, shape: tuple[Any, ...]) -> sympy.Basic:
        """The formula of an argument broadcast to a shape."""

    def read(self, node: Node) -> SymbolicTensor:
        """The formula of a tensor operand."""

    def as_table(self, node: Node) -> SymbolicTensor:
        """A tensor operand as a table of its own elements, whatever its formula is."""

    def size(self, value: Any) -> sympy.Basic:
        """An integer argument as an expression."""


@dataclass(frozen=True)
class Operation:
    """One node for a rule: its kind, its arguments by name, the shape and dtype of its result.

    Indices of formulas are axis(0), axis(1), … of the result, or of the operand that `read` returns.
    """

    algebra: Formulas
    node: Node
    kind: str
    arguments: dict[str, Any]
    shape: tuple[Any, ...]
    dtype: torch.dtype = field(default=torch.int64)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def rank(self) -> int:
        """The number of axes of the result."""
        return len(self.shape)

    def is_tensor(self, name: str) -> bool:
        """True when an argument is a tensor."""
        value = self.arguments.get(name)
        return isinstance(value, Node) and shape_of(value) is not None

    def source_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor argument."""
        found = dtype_of(self.arguments[name])
        if found is None:
            raise TypeError(f"{name} of {self.node.name} is not a tensor")
        return found

    def element(self, name: str) -> sympy.Basic:
        """The formula of an argument (tensor or number) broadcast to the result's shape."""
        return self.algebra.element(self.arguments[name], self.shape)

    def value(self, name: str) -> sympy.Basic:
        """The argument as a number or a formula of numbers; a condition counts as 1 or 0."""
        return as_number(self.element(name))

    def condition(self, name: str) -> sympy.Basic:
        """The argument as the condition that it is not zero.  Exact for every dtype."""
        return as_condition(self.element(name))

    def read(self, name: str) -> SymbolicTensor:
        """The formula of a tensor argument in its own indices."""
        return self.algebra.read(self.arguments[name])

    def size(self, name: str) -> sympy.Basic:
        """An integer argument."""
        return self.algebra.size(self.arguments[name])

    def inside(self, condition: sympy.Basic) -> sympy.Basic:
        """A condition on the result's indices, which are below its sizes."""
        return within(condition, {axis(n): size_of(size) - 1 for n, size in enumerate(self.shape)})

    def axis_number(self, value: int) -> int:
        """An axis argument counted from the left."""
        return value % max(self.rank, 1)


Rule = Callable[[Operation], "sympy.Basic | None"]
RULES: dict[str, Rule] = {}


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Register a rule for kinds of the vocabulary.

    A rule returns the formula of the result's element, exact for its dtype and every size, or None; it raises NoFormula
    where what it needs is not exact.
    """

    def register(function: Rule) -> Rule:
        for name in kinds:
            RULES[name] = function
        return function

    return register


def leafwise(op: Operation, names: tuple[str, ...], function: Callable[..., sympy.Basic]) -> sympy.Basic:
    """`function` of the leaves of the named arguments, choices pushed outwards; a boolean result becomes a condition."""
    found = spread(function, [op.value(name) for name in names])
    return as_condition(found) if op.dtype == torch.bool and not is_boolean(found) else found
