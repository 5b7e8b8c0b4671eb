"""What each operation does to the token axis; an operation that would mix tokens is refused."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import value_of
from subquad.token_axis import (
    Locality,
    TokenAxis,
    copy_axis,
    expression_of,
    name_of,
    operator_arguments,
    reads_tokens,
    refuse,
    shape_of,
    sizes_of,
    tensor_inputs,
)

Node = torch.fx.Node


def broadcast(proof: Locality, node: Node) -> None:
    """Pointwise over broadcast inputs: all token axes must meet, counted from the right."""
    rank = len(shape_of(node))
    found: TokenAxis | None = None
    for n in tensor_inputs(node):
        axis = proof.axes.get(n)
        if axis is None:
            continue
        moved = TokenAxis(axis.axis - len(shape_of(n)) + rank, axis.outer, axis.inner)
        if found is not None and moved != found:
            refuse(node, f"`{name_of(node)}` pairs every token with every other token.")
        found = moved
    if found is not None:
        proof.axes[node] = found


def _keep(proof: Locality, node: Node) -> None:
    copy_axis(proof, node, node.args[0])


def _reduce(proof: Locality, node: Node) -> None:
    """A reduction over given axes, none of them the token axis."""
    axis = proof.axes.get(node.args[0])
    if axis is None:
        return
    rank = len(shape_of(node.args[0]))
    named = operator_arguments(node)
    dims = named.get("dim", named.get("dims"))
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % rank for d in dims]
    if axis.axis in dims:
        if name_of(node) == "cumsum" and node in proof.closed:
            proof.history.append(node)
            proof.axes[node] = axis
            return
        refuse(node, f"`{name_of(node)}` mixes tokens: it runs over the axis of the tokens.")
    value = value_of(node)
    first = value[0] if isinstance(value, (list, tuple)) else value
    gone = 0 if len(first.shape) == rank else sum(d < axis.axis for d in dims)
    proof.axes[node] = TokenAxis(axis.axis - gone, axis.outer, axis.inner)


def _normalise(proof: Locality, node: Node) -> None:
    """layer_norm and rms_norm over the trailing axes."""
    axis = proof.axes.get(node.args[0])
    if axis is not None and axis.axis >= len(shape_of(node.args[0])) - len(node.args[1]):
        refuse(node, f"`{name_of(node)}` normalises over the tokens.")
    _keep(proof, node)


def _linear(proof: Locality, node: Node) -> None:
    if any(n in proof.axes for n in tensor_inputs(node)[1:]):
        refuse(node, "a projection's weight is computed from tokens.")
    axis = proof.axes.get(node.args[0])
    if axis is not None and axis.axis == len(shape_of(node.args[0])) - 1:
        refuse(node, "a projection mixes tokens: it contracts the axis of the tokens.")
    _keep(proof, node)


def _addmm(proof: Locality, node: Node) -> None:
    if node.args[0] in proof.axes or node.args[2] in proof.axes:
        refuse(node, "a projection's weight or bias is computed from tokens.")
    axis = proof.axes.get(node.args[1])
    if axis is not None and axis.axis == 1:
        refuse(node, "a projection mixes tokens: it contracts the axis of the tokens.")
    copy_axis(proof, node, node.args[1])


def _matmul(proof: Locality, node: Node) -> None:
    left, right = node.args[0], node.args[1]
    rank = len(shape_of(node))
    rows, columns = proof.axes.get(left), proof.axes.get(right)
    if rows is not None and rows.axis == len(shape_of(left)) - 1:
        refuse(node, "a matrix product mixes tokens: it contracts the axis of the tokens.")
    if columns is not None and columns.axis == len(shape_of(right)) - 2:
        refuse(node, "a matrix product mixes tokens: it contracts the axis of the tokens.")
    found = set()
    if rows is not None:
        found.add(TokenAxis(rows.axis - len(shape_of(left)) + rank, rows.outer, rows.inner))
    if columns is not None:
        found.add(TokenAxis(columns.axis - len(shape_of(right)) + rank, columns.outer, columns.inner))
    if len(found) > 1:
        refuse(node, "a matrix product pairs every token with every other token; this attention was not recognised.")
    if found:
        proof.axes[node] = found.pop()


def _view(proof: Locality, node: Node) -> None:
    """Reshapes keep row-major order: as many elements lie before and after each token as before."""
    axis = proof.axes.get(node.args[0])
    if axis is None:
        return
    old, new = sizes_of(shape_of(node.args[0])), sizes_of(shape_of(node))
    before = sympy.Mul(*old[: axis.axis]) * axis.outer
    after = sympy.Mul(*old[axis.axis + 1 :]) * axis.inner
    long = [n for n, size in enumerate(new) if size.free_symbols & proof.tokens]
    if len(long) != 1:
        refuse(node, f"`{name_of(node)}` spreads the tokens over several axes or hides them.")
    place = long[0]
    outer = sympy.cancel(before / sympy.Mul(*new[:place]))
    inner = sympy.cancel(after / sympy.Mul(*new[place + 1 :]))
    total = sympy.cancel(new[place] / (outer * inner))
    if not _whole(outer) or not _whole(inner) or total not in proof.tokens:
        refuse(node, f"`{name_of(node)}` regroups tokens in a way that is not understood.")
    proof.axes[node] = TokenAxis(place, outer, inner)


def _whole(size: sympy.Expr) -> bool:
    return bool(sympy.denom(size) == 1)


def _permute(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    if axis is None:
        return
    rank = len(shape_of(node.args[0]))
    order = list(range(rank))
    if name_of(node) == "permute":
        dims: Any = node.args[1]
        order = [d % rank for d in dims]
    elif name_of(node) == "transpose":
        a, b = (d % rank for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order = order[::-1] if rank <= 2 else [*order[:-2], order[-1], order[-2]]
    proof.axes[node] = TokenAxis(order.index(axis.axis), axis.outer, axis.inner)


def _unsqueeze(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    if axis is not None:
        place = node.args[1] % len(shape_of(node))
        proof.axes[node] = TokenAxis(axis.axis + (place <= axis.axis), axis.outer, axis.inner)


def _squeeze(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    if axis is not None:
        shape = shape_of(node.args[0])
        dims: Any = node.args[1] if len(node.args) > 1 else [n for n, size in enumerate(shape) if size == 1]
        dims = [d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)]
        gone = sum(1 for d in dims if d < axis.axis and shape[d] == 1)
        proof.axes[node] = TokenAxis(axis.axis - gone, axis.outer, axis.inner)


def _slice(proof: Locality, node: Node) -> None:
    named = operator_arguments(node)
    source = node.args[0]
    axis = proof.axes.get(source)
    place = named.get("dim", 0) % len(shape_of(source))
    if axis is not None and place == axis.axis:
        if sizes_of(shape_of(source)) != sizes_of(shape_of(node)):
            refuse(node, "a slice keeps some tokens and drops others before the logits.")
        proof.axes[node] = axis
        return
    if axis is not None:
        proof.axes[node] = axis
    elif proof.depends_on_length(shape_of(node)[place]):
        start = named.get("start") or 0
        if (
            not isinstance(start, int)
            or named.get("step", 1) != 1
            or expression_of(shape_of(node)[place]) not in proof.tokens
        ):
            refuse(node, "a table is cut to the sequence length at a moving start, which is not understood.")
        proof.axes[node] = TokenAxis(place)


def _arange(proof: Locality, node: Node) -> None:
    if not proof.depends_on_length(shape_of(node)[0]):
        return
    if expression_of(shape_of(node)[0]) not in proof.tokens:
        refuse(node, "`arange` counts to something other than the number of tokens.")
    named = operator_arguments(node)
    if not all(isinstance(named.get(key, default), int) for key, default in (("start", 0), ("step", 1))):
        refuse(node, "`arange` starts at a number that is not constant.")
    proof.axes[node] = TokenAxis(0)


def _fill(proof: Locality, node: Node) -> None:
    """A constant of some size: uniform along every axis; a token axis if one has the sequence length."""
    long = [n for n, size in enumerate(shape_of(node)) if expression_of(size) in proof.tokens]
    if len(long) == 1:
        proof.axes[node] = TokenAxis(long[0])


def _expand(proof: Locality, node: Node) -> None:
    broadcast(proof, node)
    if node not in proof.axes:
        _fill(proof, node)


def _repeat(proof: Locality, node: Node) -> None:
    """Copies along axes that are not the tokens'."""
    axis = proof.axes.get(node.args[0])
    if axis is not None:
        times: Any = node.args[1]
        place = axis.axis + len(times) - len(shape_of(node.args[0]))
        if times[place] != 1:
            refuse(node, "`repeat` puts the tokens one more time behind themselves.")
        proof.axes[node] = TokenAxis(place, axis.outer, axis.inner)


def _cat(proof: Locality, node: Node) -> None:
    place = operator_arguments(node).get("dim", 0) % len(shape_of(node))
    axes = {proof.axes.get(n) for n in tensor_inputs(node)}
    if len(axes) > 1 or any(axis is not None and axis.axis == place for axis in axes):
        refuse(node, "`cat` joins tokens, or joins values over tokens with values that are not.")
    if axes and (axis := axes.pop()) is not None:
        proof.axes[node] = axis


def _split(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    rank = len(shape_of(node.args[0]))
    if axis is not None:
        place = operator_arguments(node).get("dim", 0) % rank
        if place == axis.axis:
            refuse(node, f"`{name_of(node)}` takes the tokens apart.")
        gone = int(name_of(node) == "unbind" and place < axis.axis)
        proof.axes[node] = TokenAxis(axis.axis - gone, axis.outer, axis.inner)


def _select(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    if axis is not None:
        place = node.args[1] % len(shape_of(node.args[0]))
        if place == axis.axis:
            refuse(node, "`select` takes one token out of the sequence.")
        proof.axes[node] = TokenAxis(axis.axis - (place < axis.axis), axis.outer, axis.inner)


def _embedding(proof: Locality, node: Node) -> None:
    if node.args[0] in proof.axes:
        refuse(node, "an embedding table is computed from tokens.")
    copy_axis(proof, node, node.args[1])


def _index(proof: Locality, node: Node) -> None:
    """table[..., indices]: a table without tokens, read at token-wise places on one axis; a lone index keeps its place."""
    used = [(n, i) for n, i in enumerate(node.args[1]) if i is not None]
    if node.args[0] in proof.axes or len(used) != 1:
        if reads_tokens(proof, node):
            refuse(node, "indexing reads one token's place from another.")
        return
    place, index = used[0]
    axis = proof.axes.get(index)
    if axis is not None:
        proof.axes[node] = TokenAxis(place + axis.axis, axis.outer, axis.inner)


RULES = {
    **dict.fromkeys(("to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy"), _keep),
    "type_as": _keep,
    **dict.fromkeys(("relu", "gelu", "silu", "softplus", "tanh", "sigmoid", "relu6", "elu", "selu", "mish"), _keep),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "hardswish"), _keep),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "softmax", "log_softmax", "_softmax", "cumsum", "argmax"), _reduce),
    **dict.fromkeys(("argmin", "topk", "sort", "max", "min", "var", "var_mean", "std", "logsumexp"), _reduce),
    **dict.fromkeys(("any", "all", "norm", "linalg_vector_norm"), _reduce),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalise),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _view),
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "mT"), _permute),
    **dict.fromkeys(("full", "ones", "zeros", "empty", "new_ones", "new_zeros", "new_full", "scalar_tensor"), _fill),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _split),
    "linear": _linear, "addmm": _addmm, "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "unsqueeze": _unsqueeze,
    "squeeze": _squeeze, "slice": _slice, "arange": _arange, "expand": _expand, "repeat": _repeat, "cat": _cat, "select": _select,
    "embedding": _embedding, "index": _index,
}  # fmt: skip
