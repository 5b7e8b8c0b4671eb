"""Checks claims about shared columns on numbers: every element that a claim calls equal is compared between rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy
import torch

from subquad.capture import Capture
from subquad.ir.graph import shape_of
from subquad.ir.mask import FloorDiv
from subquad.passes.recognize.symbolic_tensor import axis, size_of
from subquad.passes.share_prefix.claims import ROW, Claims


class _Recording(torch.fx.Interpreter):
    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        self.env_of_all = getattr(self, "env_of_all", {}) | {n: value}
        return value


def violations(capture: Capture, claims: Claims, inputs: tuple[torch.Tensor, ...], **sizes: int) -> list[str]:
    """Names of the nodes whose claim the values of one run contradict; sizes: values of symbols the claims were made with."""
    runner = _Recording(capture.graph, garbage_collect_values=False)
    with torch.no_grad():
        runner.run(*inputs)
    known = {sympy.Symbol(name): value for name, value in sizes.items()}
    for node, value in runner.env_of_all.items():
        if node.op == "placeholder":
            for size, number in zip(shape_of(node) or (), value.shape, strict=True):
                known |= {symbol: number for symbol in size_of(size).free_symbols if size_of(size) == symbol}
    return [
        node.name
        for node, claim in claims.items()
        if isinstance(value := runner.env_of_all[node], torch.Tensor) and not _holds(value, claim, known)
    ]


def _holds(value: torch.Tensor, claim: Any, known: dict[Any, int]) -> bool:
    grid = np.indices(tuple(value.shape)).reshape(value.dim(), -1)

    def at(formula: sympy.Basic) -> np.ndarray:
        symbols = [axis(n) for n in range(value.dim())]
        run = sympy.lambdify(symbols, formula.xreplace(known), modules=[{"FloorDiv": np.floor_divide}, "numpy"])
        return np.broadcast_to(run(*grid), grid.shape[1:])

    rows = at(claim.row)
    inside = np.ones_like(rows, bool)
    if claim.column is not None:
        columns = at(claim.column)
        inside = columns < int(claim.columns.xreplace(known))
    group = sympy.lambdify([ROW], claim.group.xreplace(known), modules=[{"FloorDiv": np.floor_divide}, "numpy"])
    groups = np.broadcast_to(group(rows), rows.shape)
    others = grid.copy()
    for n in range(value.dim()):
        if axis(n) in claim.row.free_symbols and claim.row == axis(n):
            others[n] = 0
    if not claim.row.is_Symbol:
        return True
    flat = value.detach().double().reshape(-1).numpy()
    seen: dict[tuple[int, ...], float] = {}
    for place in np.flatnonzero(inside):
        key = (int(groups[place]), *map(int, others[:, place]))
        first = seen.setdefault(key, float(flat[place]))
        if not (
            abs(first - flat[place]) <= 1e-5 * (1 + abs(first))
            or (np.isnan(first) and np.isnan(flat[place]))
            or first == flat[place]
        ):
            return False
    return True


__all__ = ["FloorDiv", "violations"]
