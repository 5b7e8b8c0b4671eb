"""What matrix products, projections and convolutions do to claims about shared columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.vocabulary import arguments
from subquad.passes.recognize.symbolic_tensor import axis, is_one
from subquad.passes.share_prefix.claims import Claims, Shared, Sizes, meet

Node = torch.fx.Node


def named_arguments(node: Node) -> dict[str, Any]:
    """An operation's arguments by their schema names, or by the vocabulary's outside ATen."""
    if isinstance(node.target, torch._ops.OpOverload):
        names = [(a.name, a.default_value) for a in node.target._schema.arguments]
        given = dict(zip([name for name, _ in names], node.args, strict=False)) | dict(node.kwargs)
        return {name: given.get(name, default) for name, default in names}
    return arguments(node)


def matmul(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """matmul, bmm, mm."""
    named = arguments(node)
    return _product(named["a"], named["b"], node, claims)


def addmm(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """A product with a bias of one axis."""
    named = arguments(node)
    if named["bias"] in claims or len(shape_of(named["bias"]) or ()) > 1:
        return None
    return _product(named["x"], named["weight"], node, claims)


def _product(left: Node, right: Node, result: Node, claims: Claims) -> Shared | None:
    """A matrix product: the contracted axis must not be that of rows or columns."""
    a, b, out = (len(shape_of(n) or ()) for n in (left, right, result))
    if a < 2 or b < 2:
        return None
    found: list[Shared] = []
    silent: set[sympy.Basic] = set()
    for operand, rank, contracted, kept, place in ((left, a, a - 1, a - 2, out - 2), (right, b, b - 2, b - 1, out - 1)):
        claim, shape = claims.get(operand), shape_of(operand) or ()
        places = {n: n + out - rank for n in range(rank - 2)} | {kept: place}
        if claim is None:
            silent |= {axis(places[n]) for n in places if not is_one(shape[n])}
        elif axis(contracted) in claim.symbols:
            return None
        else:
            found.append(claim.moved(places))
    claim = meet(found) if found else None
    return None if claim is None or claim.row.free_symbols & silent else claim


def linear(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """A projection whose weight and bias are the same for all rows."""
    named = arguments(node)
    source = named["x"]
    claim, last = claims.get(source), len(shape_of(source) or ()) - 1
    others = [n for n in node.all_input_nodes if n is not source]
    return None if claim is None or axis(last) in claim.symbols or any(n in claims for n in others) else claim


def convolution(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """A convolution over [B, C, T]: column c reads columns c - padding … c - padding + (kernel - 1)·dilation."""
    named = named_arguments(node)
    source, weight = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    claim, shape, kernel = claims.get(source), shape_of(source) or (), shape_of(weight) or ()
    if claim is None or named.get("transposed", False) or claim.row != axis(0) or axis(1) in claim.symbols:
        return None
    if claim.column is None:
        return claim
    single = [_only(named[key]) for key in ("stride", "padding", "dilation")]
    if len(shape) != 3 or claim.column != axis(2) or single[0] != 1 or not all(isinstance(n, int) for n in single):
        return None
    return replace(claim, columns=claim.columns + single[1] - (kernel[2] - 1) * single[2])


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
