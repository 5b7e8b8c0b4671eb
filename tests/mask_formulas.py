"""Every tensor of a graph beside its formula, evaluated at every index: where the two differ first."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from mask_programs import inputs
from sympy.core.function import AppliedUndef
from torch import Tensor

from subquad.ir.mask import FloorDiv, Where
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.symbolic_tensor import axis

SIZES = [(2, 6, 0, True), (2, 7, 1, False), (1, 1, 2, False), (3, 13, 3, False), (1, 4, 0, False), (2, 1, 1, True)]
"""Batch, length, seed, plain of the inputs that are tried."""


class Values(torch.fx.Interpreter):
    """The value of every node."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def of(self, given: tuple[Tensor, ...]) -> dict[torch.fx.Node, Any]:
        """Run on concrete inputs."""
        self.run(*given)
        return self.env


def evaluated(
    formula: sympy.Basic, shape: tuple[int, ...], symbols: dict[sympy.Symbol, int], values: dict[str, Tensor]
) -> Any:
    """A formula of axis indices at every index of a shape, in int64, float64 and bool."""
    index = {
        axis(n): torch.arange(size).reshape([-1 if m == n else 1 for m in range(len(shape))])
        for n, size in enumerate(shape)
    }

    def tensor(x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else torch.tensor(x)

    def go(e: sympy.Basic) -> Any:
        if e in (sympy.true, sympy.false):
            return torch.tensor(bool(e))
        if e.is_Symbol:
            return tensor(index[e] if e in index else symbols[e])
        if e.is_number:
            return torch.tensor(int(e)) if e.is_Integer else torch.tensor(float(e), dtype=torch.float64)
        parts = [go(a) for a in e.args]
        if isinstance(e, AppliedUndef):
            table = (
                values[e.func.__name__].reshape(-1) if not values[e.func.__name__].dim() else values[e.func.__name__]
            )
            places = torch.broadcast_tensors(*parts)
            inside = torch.stack([(p >= 0) & (p < s) for p, s in zip(places, table.shape, strict=True)]).all(0)
            if table.numel() == 0:
                return torch.zeros_like(inside, dtype=torch.int64)
            found = table[tuple(p.clamp(0, s - 1) for p, s in zip(places, table.shape, strict=True))]
            found = found.double() if found.dtype.is_floating_point else found.long()
            return torch.where(inside, found, torch.zeros_like(found))
        if isinstance(e, sympy.core.relational.Relational):
            name = {sympy.Le: "le", sympy.Lt: "lt", sympy.Ge: "ge", sympy.Gt: "gt", sympy.Eq: "eq", sympy.Ne: "ne"}[
                e.func
            ]
            return getattr(torch, name)(*parts)
        if isinstance(e, sympy.Not):
            return ~parts[0]
        if isinstance(e, Where):
            whole = not any(part.dtype.is_floating_point for part in parts[1:])
            return torch.where(parts[0], *(part.long() if whole else part.double() for part in parts[1:]))
        if isinstance(e, FloorDiv):
            return torch.div(*parts, rounding_mode="floor")
        if isinstance(e, sympy.Mod):
            return torch.remainder(*parts)
        if isinstance(e, sympy.Abs):
            return parts[0].abs()
        joins = {
            sympy.And: torch.logical_and, sympy.Or: torch.logical_or, sympy.Add: torch.add, sympy.Mul: torch.mul,
            sympy.Min: torch.minimum, sympy.Max: torch.maximum, sympy.Pow: torch.pow,
        }  # fmt: skip
        total = parts[0]
        for part in parts[1:]:
            total = joins[e.func](total, part)
        return total

    return tensor(go(formula)).expand(shape)


def disagreement(module: torch.fx.GraphModule, cases: list[tuple[int, int, int, bool]] = SIZES) -> tuple[str, int]:
    """What differs first between a tensor of the graph and its formula ("" when nothing does), and how many have one."""
    algebra = MaskAlgebra(module)
    proved = 0
    for number, (batch, length, seed, plain) in enumerate(cases):
        given = inputs(batch, length, seed, plain)
        try:
            values = Values(module).of(given)
        except (RuntimeError, IndexError):
            continue
        symbols: dict[sympy.Symbol, int] = {}
        for node in module.graph.nodes:
            recorded = node.meta.get("val")
            if isinstance(recorded, torch.Tensor) and node.op == "placeholder":
                for size, actual in zip(recorded.shape, values[node].shape, strict=True):
                    if isinstance(size, torch.SymInt):
                        symbols[size.node.expr] = actual
        by_name = {node.name: value for node, value in values.items()}
        for node in module.graph.nodes:
            actual = values.get(node)
            if node.op != "call_function" or not isinstance(actual, Tensor):
                continue
            formula = algebra.formula(node).expression
            proved += number == 0 and node.name not in algebra.tables
            want = evaluated(formula, tuple(actual.shape), symbols, by_name)
            if not _same(want, actual, bool(formula.atoms(AppliedUndef)) or not formula.is_integer):
                return f"{node.format_node()} = {formula} at batch {batch}, length {length}, seed {seed}", proved
    return "", proved


def _same(want: Tensor, actual: Tensor, rounds: bool) -> bool:
    """Equal everywhere; a floating tensor of a table's elements or of quotients may have rounded."""
    if not actual.dtype.is_floating_point:
        return torch.equal(want.long(), actual.long())
    if rounds:
        return torch.allclose(want.to(actual.dtype), actual, rtol=2**-6, atol=0, equal_nan=True)
    return torch.allclose(want.double(), actual.double(), rtol=0, atol=0, equal_nan=True)
