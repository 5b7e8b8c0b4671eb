"""Read a projection of the layer input by a held weight: linear, addmm, a matrix product, Conv1D, with LoRA beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
import torch.fx

from subquad.ir.graph import rank_of, shape_of
from subquad.ir.provenance import Adapter, Projection
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.projection_norm import Held
from subquad.passes.recognize.provenance_index import Index, Indices
from subquad.passes.recognize.provenance_terms import given, word
from subquad.passes.recognize.symbolic_tensor import size_of

Node = torch.fx.Node
SUMS = 4
LAYOUT = frozenset(["view", "flatten", "unflatten", "contiguous", "cast", "dropout"])


@dataclass(frozen=True)
class Affine:
    """x · weightᵀ + bias, with adapters; the weight is stored [in, out] when `transposed`."""

    x: Node
    weight: Node
    transposed: bool
    bias: Node | None = None
    adapters: tuple[Adapter, ...] = ()


def read_affine(node: Any, held: Held, sums: int = SUMS) -> Affine | None:
    """The affine map that a node computes of an activation, all tensors of it held; None when it computes none.

    sums: how many biases and adapters may be added outside the product.
    """
    if word(node) == "add":
        return _plus(node, held, sums) if sums and node.kwargs.get("alpha", 1) == 1 else None
    return _product(node, held)


def _product(node: Any, held: Held) -> Affine | None:
    name = word(node)
    if name == "linear":
        if node.op == "call_module":
            return None
        a = arguments(node)
        return _affine(a["x"], a["weight"], False, a["bias"], held)
    if name == "matmul":
        a = arguments(node)
        return _affine(a["a"], a["b"], True, None, held) if rank_of(a["b"]) == 2 else None
    if name == "addmm":
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        return _affine(node.args[1], node.args[2], True, node.args[0], held)
    return None


def _affine(x: Any, weight: Any, transposed: bool, bias: Any, held: Held) -> Affine | None:
    turned = 0
    while kind(weight) in ("t", "transpose", "permute", "cast", "contiguous"):
        turned += kind(weight) in ("t", "transpose", "permute") and rank_of(weight) == 2
        weight = arguments(weight)["x"]
    found = held(weight)
    if found is None or rank_of(found) != 2 or not isinstance(x, Node) or held(x) is not None:
        return None
    known = None if bias is None else held(bias)
    if bias is not None and known is None:
        return None
    return Affine(x, found, transposed ^ bool(turned % 2), known)


def _plus(node: Node, held: Held, sums: int) -> Affine | None:
    """An affine map plus a held bias, or plus a low-rank term of the same input."""
    for base, other in (node.args[:2], node.args[1::-1]):
        if not isinstance(base, Node) or not isinstance(other, Node):
            return None
        bare = _unlaid(base)
        affine = read_affine(bare, held, sums - 1)
        if affine is None:
            continue
        bias = held(other)
        if bias is not None and affine.bias is None and rank_of(bias) == 1 and not affine.adapters:
            return replace(affine, bias=bias)
        adapter = _adapter(other, affine.x, held)
        if adapter is not None:
            return replace(affine, adapters=(*affine.adapters, adapter))
    return None


def _adapter(node: Any, x: Node, held: Held) -> Adapter | None:
    scale, here = 1.0, _unlaid(node)
    while word(here) == "mul" and any(isinstance(y, int | float) for y in here.args[:2]):
        number, here = sorted(here.args[:2], key=lambda y: isinstance(y, Node))
        scale, here = scale * float(number), _unlaid(here)
    up = _product(here, held)
    down = _product(_unlaid(up.x), held) if up is not None else None
    if up is None or down is None or up.bias or down.bias or up.transposed or down.transposed:
        return None
    return Adapter(down.weight, up.weight, scale) if _unlaid(down.x) is _unlaid(x) else None


def _unlaid(node: Any) -> Any:
    while word(node) in LAYOUT:
        node = given(node, 0, "input")
    return node


def projection_of(
    node: Node, indices: Indices, sizes: dict[str, Any], roles: dict[str, str], held: Held
) -> Projection | str:
    """The projection that makes `node`, read at `indices`; a sentence when it is none.

    sizes: of the operand's tokens, heads outermost first.  roles: of every token "b", "t" or "h".
    """
    heads = {token: size for token, size in sizes.items() if roles[token] == "h"}
    affine = read_affine(node, held)
    if affine is None:
        return f"it is made by `{word(node) or node.name}`, which is no projection by a held weight"
    *rows, feature = indices
    axes = tuple("".join(roles.get(token, "?") for token, _ in index.terms) for index in rows)
    if any(index.values.any() for index in rows) or set("".join(axes)) - {"b", "t"}:
        return "its heads or places are not features of the projection"
    if not all(_is_whole(index, size, sizes) for index, size in zip(rows, shape_of(node) or (), strict=False)):
        return "it is a part of the projection's batch or time"
    features = _features(feature, heads)
    if features is None:
        return "its heads are not laid out along the features of the projection"
    out = (shape_of(node) or (0,))[-1]
    number = int(np.prod([*heads.values()], dtype=np.int64)) if heads else 1
    flat = features.reshape(-1)
    whole = range(int(flat[0]), int(flat[0]) + flat.size)
    held_rows = whole if np.array_equal(flat, np.arange(whole.start, whole.stop)) else tuple(flat.tolist())
    return Projection(
        node,
        affine.x,
        affine.weight,
        affine.transposed,
        affine.bias,
        held_rows,
        number,
        int(out),
        axes,
        affine.adapters,
    )


def _is_whole(index: Index, size: Any, sizes: dict[str, Any]) -> bool:
    """True when the tokens of an index run through a whole axis."""
    total = sympy.prod(sizes[token] for token, _ in index.terms)
    return bool(sympy.expand(total - size_of(size)) == 0)


def _features(feature: Index, heads: dict[str, int]) -> np.ndarray | None:
    """[heads…, width] of feature numbers."""
    strides = dict(feature.terms)
    if set(strides) - set(heads) or not all(isinstance(s, int) for s in strides.values()):
        return None
    total = feature.values
    for token, size in reversed(heads.items()):
        shape = (size, *[1] * total.ndim)
        total = strides.get(token, 0) * np.arange(size).reshape(shape) + total
    return total
