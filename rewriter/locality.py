"""Prove that a captured graph treats tokens independently everywhere outside its attention operators.

Abstract interpretation: every value either has no token axis, or one axis (possibly merged with others, as in [B·T, D])
that runs over the tokens.  An operation keeps the proof when output token t depends on input tokens t alone; a running sum
over integers that depend on the inputs only is allowed as well and becomes a value computed from the whole history.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.errors import SubquadError
from subquad.ir.graph import ancestors, module_path, source_of, value_of
from subquad.ir.refusal import Refusal

Node = torch.fx.Node


class NotIncremental(SubquadError):
    """A graph that cannot be run token by token; `refusal` names node, module path and source line."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal

    def __reduce__(self) -> tuple[Any, ...]:
        return NotIncremental, (self.refusal,)


@dataclass(frozen=True)
class TokenAxis:
    """Axis `axis` of a value has size outer · T · inner, tokens in row-major order between the two factors."""

    axis: int
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One


@dataclass
class Locality:
    """The proof.

    axes: the token axis of every tensor node that has one.  tokens: symbols that stand for the sequence length.
    inputs: placeholders with a token axis.  history: nodes that are running sums over the inputs' tokens.
    closed: nodes that depend on inputs and constants through integer or boolean values only.
    """

    axes: dict[Node, TokenAxis] = field(default_factory=dict)
    tokens: set[sympy.Symbol] = field(default_factory=set)
    inputs: list[Node] = field(default_factory=list)
    history: list[Node] = field(default_factory=list)
    closed: set[Node] = field(default_factory=set)

    def depends_on_length(self, size: Any) -> bool:
        """True when a size or number varies with the sequence length."""
        return bool(_expression(size).free_symbols & self.tokens)


def prove_locality(module: torch.fx.GraphModule) -> Locality:
    """Analyse an ATen graph f(token ids [B, T], ...) whose attention sites are subquad operators.

    Raises NotIncremental at the first operation that mixes tokens, or that the analysis does not know.
    """
    proof = Locality()
    for node in ancestors(n for n in module.graph.nodes if n.op in ("output", "placeholder")):
        if node.op == "placeholder":
            _placeholder(proof, node)
        elif node.op == "get_attr":
            proof.closed.add(node)
        elif node.op == "call_function":
            _call(proof, node)
        elif node.op != "output":
            refuse(node, f"the graph holds a {node.op} node, which only an ATen graph from torch.export may be without.")
    if not proof.inputs:
        raise NotIncremental(Refusal("", "decode", "no input of the model has the shape [batch, tokens] with a symbolic length."))
    return proof


def refuse(node: Node, reason: str) -> None:
    """Raise NotIncremental for this node."""
    raise NotIncremental(Refusal(module_path(node), f"decode: {_name(node)}", reason, source_of(node)))


def _placeholder(proof: Locality, node: Node) -> None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        refuse(node, "the model takes a number as input, which an incremental decoder cannot give.")
    if value.dim() != 2 or value.is_floating_point() or not isinstance(value.shape[1], torch.SymInt):
        refuse(node, f"the input `{node.name}` is not an integer tensor [batch, tokens] with a symbolic length.")
    proof.tokens |= _expression(value.shape[1]).free_symbols
    proof.axes[node] = TokenAxis(1)
    proof.inputs.append(node)
    proof.closed.add(node)


def _call(proof: Locality, node: Node) -> None:
    value = value_of(node)
    if all(n in proof.closed for n in node.all_input_nodes) and not _floating(value):
        proof.closed.add(node)
    if isinstance(value, (torch.SymInt, int, float, bool, torch.SymBool, torch.SymFloat)):
        _number(proof, node)
        return
    packet = _name(node)
    if node.target is operator.getitem:
        _copy_axis(proof, node, node.args[0])
        return
    if packet.startswith("_assert") or packet.startswith("sym_constrain"):
        return
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "subquad":
        _attention(proof, node)
        return
    rule = RULES.get(packet)
    if rule is None and _pointwise(node):
        rule = _broadcast
    if rule is None:
        if _tokens_in(proof, node) or _length_in(proof, node):
            refuse(node, f"`{packet}` is not known to treat tokens independently.")
        return
    _check_numbers(proof, node, packet)
    rule(proof, node)
    _check_shape(proof, node)


def _number(proof: Locality, node: Node) -> None:
    if _name(node) == "sym_size" or not isinstance(node.target, torch._ops.OpOverload):
        return
    if _tokens_in(proof, node):
        refuse(node, f"`{_name(node)}` reads a number out of a tensor over tokens.")


SHAPED = {
    "view", "reshape", "_unsafe_view", "expand", "full", "ones", "zeros", "empty", "new_ones", "new_zeros", "new_full",
    "new_empty", "arange", "slice", "unflatten", "narrow",
}  # fmt: skip
"""Operations that may take the sequence length as a size."""


def _check_numbers(proof: Locality, node: Node, packet: str) -> None:
    if packet not in SHAPED and _length_in(proof, node):
        refuse(node, f"`{packet}` computes with the length of the sequence, which changes with every token.")


def _check_shape(proof: Locality, node: Node) -> None:
    """Whatever axis of the result varies with the length must be the tracked token axis."""
    for value, axis in _tensors(proof, node):
        long = [n for n, size in enumerate(value.shape) if proof.depends_on_length(size)]
        tracked = axis.axis if axis else None
        if len(long) > 1:
            refuse(node, f"`{_name(node)}` makes a table of tokens by tokens {list(map(str, value.shape))} outside attention.")
        if long and long[0] != tracked and not _uniform(proof, node):
            refuse(node, f"`{_name(node)}` moves tokens to another axis in a way that is not understood.")


def _tensors(proof: Locality, node: Node) -> list[tuple[torch.Tensor, TokenAxis | None]]:
    value = value_of(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    return [(v, proof.axes.get(node)) for v in values if isinstance(v, torch.Tensor)]


def _uniform(proof: Locality, node: Node) -> bool:
    return not _tokens_in(proof, node)


def _attention(proof: Locality, node: Node) -> None:
    named = operator_arguments(node)
    keys = named["k"] if isinstance(named["k"], (list, tuple)) else [named["k"]]
    values = named["v"] if isinstance(named["v"], (list, tuple)) else [named["v"]]
    for n in (named["q"], *keys, *values):
        if proof.axes.get(n) != TokenAxis(1):
            refuse(node, "an attention operator reads tokens that are not all on axis 1 (is it cross attention?).")
    proof.axes[node] = TokenAxis(1)


def operator_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator node by their schema names."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _broadcast(proof: Locality, node: Node) -> None:
    """Pointwise over broadcast inputs: all token axes must meet, counted from the right."""
    rank = len(_shape(node))
    found: TokenAxis | None = None
    for n in _inputs(node):
        axis = proof.axes.get(n)
        if axis is None:
            continue
        moved = TokenAxis(axis.axis - len(_shape(n)) + rank, axis.outer, axis.inner)
        if found is not None and moved != found:
            refuse(node, f"`{_name(node)}` pairs every token with every other token.")
        found = moved
    if found is not None:
        proof.axes[node] = found


def _keep(proof: Locality, node: Node) -> None:
    _copy_axis(proof, node, node.args[0])


def _copy_axis(proof: Locality, node: Node, source: Any) -> None:
    if source in proof.axes:
        proof.axes[node] = proof.axes[source]


def _reduce(proof: Locality, node: Node) -> None:
    """A reduction over given axes, none of them the token axis."""
    axis = proof.axes.get(node.args[0])
    if axis is None:
        return
    rank = len(_shape(node.args[0]))
    named = operator_arguments(node)
    dims = named.get("dim", named.get("dims"))
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % rank for d in dims]
    if axis.axis in dims:
        if _name(node) == "cumsum" and node in proof.closed:
            proof.history.append(node)
            proof.axes[node] = axis
            return
        refuse(node, f"`{_name(node)}` mixes tokens: it runs over the axis of the tokens.")
    value = value_of(node)
    first = value[0] if isinstance(value, (list, tuple)) else value
    gone = 0 if len(first.shape) == rank else sum(d < axis.axis for d in dims)
    proof.axes[node] = TokenAxis(axis.axis - gone, axis.outer, axis.inner)


def _normalise(proof: Locality, node: Node) -> None:
    """layer_norm and rms_norm over the trailing axes."""
    axis = proof.axes.get(node.args[0])
    if axis is not None and axis.axis >= len(_shape(node.args[0])) - len(node.args[1]):
        refuse(node, f"`{_name(node)}` normalises over the tokens.")
    _keep(proof, node)


def _linear(proof: Locality, node: Node) -> None:
    if any(n in proof.axes for n in _inputs(node)[1:]):
        refuse(node, "a projection's weight is computed from tokens.")
    axis = proof.axes.get(node.args[0])
    if axis is not None and axis.axis == len(_shape(node.args[0])) - 1:
        refuse(node, "a projection mixes tokens: it contracts the axis of the tokens.")
    _keep(proof, node)


def _addmm(proof: Locality, node: Node) -> None:
    if node.args[0] in proof.axes or node.args[2] in proof.axes:
        refuse(node, "a projection's weight or bias is computed from tokens.")
    axis = proof.axes.get(node.args[1])
    if axis is not None and axis.axis == 1:
        refuse(node, "a projection mixes tokens: it contracts the axis of the tokens.")
    _copy_axis(proof, node, node.args[1])


def _matmul(proof: Locality, node: Node) -> None:
    left, right = node.args[0], node.args[1]
    rank = len(_shape(node))
    rows, columns = proof.axes.get(left), proof.axes.get(right)
    if rows is not None and rows.axis == len(_shape(left)) - 1:
        refuse(node, "a matrix product mixes tokens: it contracts the axis of the tokens.")
    if columns is not None and columns.axis == len(_shape(right)) - 2:
        refuse(node, "a matrix product mixes tokens: it contracts the axis of the tokens.")
    found = set()
    if rows is not None:
        found.add(TokenAxis(rows.axis - len(_shape(left)) + rank, rows.outer, rows.inner))
    if columns is not None:
        found.add(TokenAxis(columns.axis - len(_shape(right)) + rank, columns.outer, columns.inner))
    if len(found) > 1:
        refuse(node, "a matrix product pairs every token with every other token; this attention was not recognised.")
    if found:
        proof.axes[node] = found.pop()


def _view(proof: Locality, node: Node) -> None:
    """Reshapes keep row-major order: as many elements lie before and after each token as before."""
    axis = proof.axes.get(node.args[0])
    if axis is None:
        return
    old, new = _sizes(_shape(node.args[0])), _sizes(_shape(node))
    before = sympy.Mul(*old[: axis.axis]) * axis.outer
    after = sympy.Mul(*old[axis.axis + 1 :]) * axis.inner
    long = [n for n, size in enumerate(new) if size.free_symbols & proof.tokens]
    if len(long) != 1:
        refuse(node, f"`{_name(node)}` spreads the tokens over several axes or hides them.")
    place = long[0]
    outer = sympy.cancel(before / sympy.Mul(*new[:place]))
    inner = sympy.cancel(after / sympy.Mul(*new[place + 1 :]))
    total = sympy.cancel(new[place] / (outer * inner))
    if not _whole(outer) or not _whole(inner) or total not in proof.tokens:
        refuse(node, f"`{_name(node)}` regroups tokens in a way that is not understood.")
    proof.axes[node] = TokenAxis(place, outer, inner)


def _whole(size: sympy.Expr) -> bool:
    return bool(sympy.denom(size) == 1)


def _permute(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    if axis is None:
        return
    rank = len(_shape(node.args[0]))
    order = list(range(rank))
    if _name(node) == "permute":
        order = [d % rank for d in node.args[1]]
    elif _name(node) == "transpose":
        a, b = (d % rank for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order = order[::-1] if rank <= 2 else [*order[:-2], order[-1], order[-2]]
    proof.axes[node] = TokenAxis(order.index(axis.axis), axis.outer, axis.inner)


def _unsqueeze(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    if axis is not None:
        place = node.args[1] % len(_shape(node))
        proof.axes[node] = TokenAxis(axis.axis + (place <= axis.axis), axis.outer, axis.inner)


def _squeeze(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    if axis is not None:
        shape = _shape(node.args[0])
        dims = node.args[1] if len(node.args) > 1 else [n for n, size in enumerate(shape) if size == 1]
        dims = [d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)]
        gone = sum(1 for d in dims if d < axis.axis and shape[d] == 1)
        proof.axes[node] = TokenAxis(axis.axis - gone, axis.outer, axis.inner)


def _slice(proof: Locality, node: Node) -> None:
    named = operator_arguments(node)
    source = node.args[0]
    axis = proof.axes.get(source)
    place = named.get("dim", 0) % len(_shape(source))
    if axis is not None and place == axis.axis:
        if _sizes(_shape(source)) != _sizes(_shape(node)):
            refuse(node, "a slice keeps some tokens and drops others before the logits.")
        proof.axes[node] = axis
        return
    if axis is not None:
        proof.axes[node] = axis
    elif proof.depends_on_length(_shape(node)[place]):
        start = named.get("start") or 0
        if not isinstance(start, int) or named.get("step", 1) != 1 or _expression(_shape(node)[place]) not in proof.tokens:
            refuse(node, "a table is cut to the sequence length at a moving start, which is not understood.")
        proof.axes[node] = TokenAxis(place)


def _arange(proof: Locality, node: Node) -> None:
    if not proof.depends_on_length(_shape(node)[0]):
        return
    if _expression(_shape(node)[0]) not in proof.tokens:
        refuse(node, "`arange` counts to something other than the number of tokens.")
    named = operator_arguments(node)
    if not all(isinstance(named.get(key, default), int) for key, default in (("start", 0), ("step", 1))):
        refuse(node, "`arange` starts at a number that is not constant.")
    proof.axes[node] = TokenAxis(0)


def _fill(proof: Locality, node: Node) -> None:
    """A constant of some size: uniform along every axis; a token axis if one has the sequence length."""
    long = [n for n, size in enumerate(_shape(node)) if _expression(size) in proof.tokens]
    if len(long) == 1:
        proof.axes[node] = TokenAxis(long[0])


def _expand(proof: Locality, node: Node) -> None:
    _broadcast(proof, node)
    if node not in proof.axes:
        _fill(proof, node)


def _cat(proof: Locality, node: Node) -> None:
    place = operator_arguments(node).get("dim", 0) % len(_shape(node))
    axes = {proof.axes.get(n) for n in _inputs(node)}
    if len(axes) > 1 or any(axis is not None and axis.axis == place for axis in axes):
        refuse(node, "`cat` joins tokens, or joins values over tokens with values that are not.")
    if axes and (axis := axes.pop()) is not None:
        proof.axes[node] = axis


def _split(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    rank = len(_shape(node.args[0]))
    if axis is not None:
        place = operator_arguments(node).get("dim", 0) % rank
        if place == axis.axis:
            refuse(node, f"`{_name(node)}` takes the tokens apart.")
        gone = int(_name(node) == "unbind" and place < axis.axis)
        proof.axes[node] = TokenAxis(axis.axis - gone, axis.outer, axis.inner)


def _select(proof: Locality, node: Node) -> None:
    axis = proof.axes.get(node.args[0])
    if axis is not None:
        place = node.args[1] % len(_shape(node.args[0]))
        if place == axis.axis:
            refuse(node, "`select` takes one token out of the sequence.")
        proof.axes[node] = TokenAxis(axis.axis - (place < axis.axis), axis.outer, axis.inner)


def _embedding(proof: Locality, node: Node) -> None:
    if node.args[0] in proof.axes:
        refuse(node, "an embedding table is computed from tokens.")
    _copy_axis(proof, node, node.args[1])


def _index(proof: Locality, node: Node) -> None:
    """table[..., indices]: a table without tokens, read at token-wise places on one axis; a lone index keeps its place."""
    used = [(n, i) for n, i in enumerate(node.args[1]) if i is not None]
    if node.args[0] in proof.axes or len(used) != 1:
        if _tokens_in(proof, node):
            refuse(node, "indexing reads one token's place from another.")
        return
    place, index = used[0]
    axis = proof.axes.get(index)
    if axis is not None:
        proof.axes[node] = TokenAxis(place + axis.axis, axis.outer, axis.inner)


RULES = {
    **dict.fromkeys(("to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy"), _keep),
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
    "squeeze": _squeeze, "slice": _slice, "arange": _arange, "expand": _expand, "cat": _cat, "select": _select,
    "embedding": _embedding, "index": _index,
}  # fmt: skip


def _pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else node.name


def _inputs(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(value_of(n), (torch.Tensor, list, tuple))]


def _tokens_in(proof: Locality, node: Node) -> bool:
    return any(n in proof.axes for n in node.all_input_nodes)


def _length_in(proof: Locality, node: Node) -> bool:
    return any(isinstance(v := value_of(n), torch.SymInt) and proof.depends_on_length(v) for n in node.all_input_nodes)


def _floating(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (list, tuple))


def _shape(node: Any) -> tuple[Any, ...]:
    value = value_of(node)
    return tuple(value.shape)


def _sizes(shape: tuple[Any, ...]) -> list[sympy.Expr]:
    return [_expression(size) for size in shape]


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else sympy.sympify(size)
