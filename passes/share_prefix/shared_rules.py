"""What each operation does to claims about shared columns; an operation without a rule ends them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx
import torch.nn.functional as F

from subquad.ir.graph import node_inputs, shape_of, value_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.index_map import IndexMap, trace_view
from subquad.passes.recognize.mixed_radix import without_divisions
from subquad.passes.recognize.symbolic_tensor import axis, is_one, size_of
from subquad.passes.share_prefix.claims import ROW, Claims, Shared, Sizes, everywhere, meet, settled
from subquad.passes.share_prefix.shared_operators import recurrence_operator, softmax_operator
from subquad.passes.share_prefix.shared_products import addmm, convolution, linear, matmul, named_arguments

Node = torch.fx.Node


def transfer(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """The claim of a node from those of its inputs."""
    if node.target is operator.getitem and isinstance(node.args[1], int):
        claim = _part(node, claims)
    else:
        claim = _by_kind(node, claims, batch)
    shape = shape_of(node)
    return claim if claim is None or shape is None else settled(claim, shape)


def _by_kind(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    name = kind(node)
    rule = RULES.get(name) or (NAMED.get(operation_name(node)) if name or _is_named(node) else None)
    if rule is not None:
        return rule(node, claims, batch)
    if trace_view(IndexMap(node, _marks(node))) is not None:
        return _movement(node, claims, batch)
    if is_pointwise(node):
        return _pointwise(node, claims, batch)
    return None


def _is_named(node: Node) -> bool:
    """True for an operation of ATen, and for the functions that take a norm's arguments in ATen's order."""
    return isinstance(node.target, torch._ops.OpOverload) or node.target in (F.layer_norm, F.rms_norm)


def operation_name(node: Node) -> str:
    """The name of an operation, whatever the dialect."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.partition("::")[2])
    return str(getattr(node.target, "__name__", node.target))


def is_pointwise(node: Node) -> bool:
    """True for an operation that acts element by element and draws no random numbers."""
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        return torch.Tag.pointwise in node.target.tags and not random
    return kind(node) in POINTWISE or operation_name(node) in POINTWISE


def _marks(node: Node) -> tuple[sympy.Basic, ...]:
    return tuple(sympy.S.Zero if is_one(size) else axis(n) for n, size in enumerate(shape_of(node) or ()))


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if shape_of(n) is not None]


def _movement(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """Views, expansions and repetitions: each element is one of the source's."""
    traced = trace_view(IndexMap(node, _marks(node)))
    if traced is None:
        return None
    base, claim = shape_of(traced.node) or (), claims.get(traced.node)
    if claim is not None:
        return claim.at({axis(n): index for n, index in enumerate(traced.indices)})
    sizes = {axis(n): size_of(size) for n, size in enumerate(shape_of(node) or ())}
    kept = [without_divisions(i, sizes) for i, size in zip(traced.indices, base, strict=True) if not is_one(size)]
    return _repeated(node, kept, batch)


def _repeated(node: Node, indices: Sequence[sympy.Basic], batch: Sizes) -> Shared | None:
    """A tensor of which nothing is claimed, read at `indices`: rows agree that read the same of its parts."""
    for n, size in enumerate(shape_of(node) or ()):
        if size_of(size) not in batch:
            continue
        readers = [index for index in indices if axis(n) in index.free_symbols]
        if not readers:
            return everywhere(n)
        if len(readers) == 1 and readers[0] != axis(n) and readers[0].free_symbols & set(_marks(node)) == {axis(n)}:
            return everywhere(n, readers[0].xreplace({axis(n): ROW}))
    return None


def _constant(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """All elements are one number."""
    return next((everywhere(n) for n, size in enumerate(shape_of(node) or ()) if size_of(size) in batch), None)


def _pointwise(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    rank = len(shape_of(node) or ())
    return _broadcast([(n, rank - len(shape_of(n) or ())) for n in _tensors(node)], claims)


def _broadcast(operands: Iterable[tuple[Node, int]], claims: Claims) -> Shared | None:
    """The meet of operands whose axes stand `offset` places further right in the result."""
    found: list[Shared] = []
    silent: list[set[sympy.Basic]] = []
    for operand, offset in operands:
        shape = shape_of(operand) or ()
        claim = claims.get(operand)
        if claim is None:
            silent.append({axis(n + offset) for n, size in enumerate(shape) if not is_one(size)})
        else:
            found.append(claim.moved({n: n + offset for n in range(len(shape))}))
    claim = meet(found) if found else None
    if claim is None or any(claim.row.free_symbols & axes for axes in silent):
        return None
    return claim


def _along(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """Softmax, sums, norms, sorts over some axes: they must not be those of rows or columns."""
    named = named_arguments(node)
    source = node.args[0]
    assert isinstance(source, Node)
    claim, shape = claims.get(source), shape_of(source) or ()
    if claim is None or any(n in claims for n in _tensors(node) if n is not source):
        return None
    dims = named.get("dim", named.get("dims"))
    places = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}
    if {axis(n) for n in places} & claim.symbols:
        return claim if operation_name(node) in RUNNING and axis_of(claim) in places else None
    result = _first_shape(node)
    if len(result) == len(shape):
        return claim
    kept = [n for n in range(len(shape)) if n not in places]
    return claim.moved({old: new for new, old in enumerate(kept)})


def axis_of(claim: Shared) -> int | None:
    """The axis whose index is the column, when it tells no rows apart."""
    if claim.column is None or not claim.column.is_Symbol or claim.column in claim.row.free_symbols:
        return None
    return int(str(claim.column)[1:])


def _first_shape(node: Node) -> tuple[Any, ...]:
    shape = shape_of(node)
    if shape is not None:
        return shape
    value = value_of(node)
    return tuple(value[0].shape) if isinstance(value, list | tuple) and value else ()


def _normalised(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """layer_norm and rms_norm over the trailing axes."""
    if len(node.args) < 2:
        return None
    source, sizes = node.args[0], node.args[1]
    assert isinstance(source, Node)
    claim, rank = claims.get(source), len(shape_of(source) or ())
    normal = {axis(n) for n in range(rank - len(sizes), rank)}  # type: ignore[arg-type]
    weighted = any(n in claims for n in _tensors(node) if n is not source)
    return None if claim is None or normal & claim.symbols or weighted else claim


def _joined(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """Concatenation: along the columns, shared parts count up to the first that is not shared throughout."""
    named = arguments(node)
    parts, shape = list(named["tensors"]), shape_of(node) or ()
    if all(part is parts[0] for part in parts) and trace_view(IndexMap(node, _marks(node))) is not None:
        return _movement(node, claims, batch)
    place = named["dim"] % len(shape)
    parts = [part for part in parts if len(shape_of(part) or ()) == len(shape)]
    found = [claims.get(part) for part in parts]
    first = found[0] if found else None
    if first is None or axis(place) in first.row.free_symbols:
        return None
    if first.column not in (None, axis(place)) or all(one is not None and one.column is None for one in found):
        whole = [one for one in found if one is not None]
        return (
            meet(whole) if len(whole) == len(found) and not any(axis(place) in one.symbols for one in whole) else None
        )
    columns, group = sympy.S.Zero, sympy.S.Zero
    for part, one in zip(parts, found, strict=True):
        joined = None if one is None or one.row != first.row else meet([replace(one, group=group), one])
        if joined is None or one is None or one.column not in (None, axis(place)):
            break
        length = size_of((shape_of(part) or ())[place])
        columns, group = columns + sympy.Min(length, one.columns), joined.group
        if not (one.columns - length).is_nonnegative:
            break
    return Shared(first.row, axis(place), columns, group)


def _stacked(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    named = arguments(node)
    parts, place = list(named["tensors"]), named["dim"] % len(shape_of(node) or ())
    if all(part is parts[0] for part in parts):
        return _movement(node, claims, batch)
    places = {n: n + (n >= place) for n in range(len(shape_of(parts[0]) or ()))}
    found = [claims[part].moved(places) for part in parts if part in claims]
    return meet(found) if len(found) == len(parts) else None


def _part(node: Node, claims: Claims) -> Shared | None:
    """One of several results."""
    source, number = node.args
    assert isinstance(source, Node)
    assert isinstance(number, int)
    name = kind(source)
    if name not in ("split", "split_with_sizes", "chunk", "unbind"):
        claim = claims.get(source)
        states = source.target is torch.ops.subquad.recurrence.default and number > 0
        return None if states and claim is not None and claim.column is not None else claim
    named = arguments(source)
    claim, shape = claims.get(named["x"]), shape_of(named["x"]) or ()
    if claim is None:
        return None
    place = named["dim"] % len(shape)
    if name == "unbind":
        moved = {axis(n): axis(n - (n > place)) for n in range(len(shape))} | {axis(place): sympy.Integer(number)}
        return claim.at(moved)
    values = value_of(source) or ()
    start = sum((size_of(value.shape[place]) for value in values[:number]), sympy.S.Zero)
    return claim.at({axis(place): axis(place) + start})


def _looked_up(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """An embedding: the table is the same for all rows."""
    named = arguments(node)
    return None if named["weight"] in claims else claims.get(named["indices"])


def _indexed(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """source[…, picks, …] by one tensor of indices: the picks of a table, or picks for all rows from a claimed source."""
    named = arguments(node)
    source = named["x"]
    if kind(node) == "index_select":
        place, picks = named["dim"] % len(shape_of(source) or ()), named["index"]
    else:
        used = [(n, pick) for n, pick in enumerate(named["indices"]) if pick is not None]
        if len(used) != 1:
            return None
        place, picks = used[0]
    width = len(shape_of(picks) or ())
    if source not in claims:
        return claims[picks].moved({n: n + place for n in range(width)}) if picks in claims else None
    claim = claims[source]
    if picks in claims or axis(place) in claim.symbols:
        return None
    return claim.moved({n: n if n < place else n + width - 1 for n in range(len(shape_of(source) or ())) if n != place})


def _gathered(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    named = arguments(node)
    source, picks = named["x"], named["index"]
    if source not in claims or picks not in claims or named["dim"] is None:
        return None
    place = named["dim"] % len(shape_of(source) or ())
    return None if axis(place) in claims[source].symbols else meet([claims[source], claims[picks]])


def _padded(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """Constant columns in front are shared too."""
    named = arguments(node)
    claim, rank = claims.get(named["x"]), len(shape_of(node) or ())
    widths = list(named["pad"])
    if claim is None or named["mode"] != "constant":
        return None
    moved = {}
    for pair in range(len(widths) // 2):
        before, after, place = widths[2 * pair], widths[2 * pair + 1], rank - 1 - pair
        if not isinstance(before, int) or not isinstance(after, int):
            return None
        if (before or after) and axis(place) in claim.row.free_symbols:
            return None
        moved[axis(place)] = axis(place) - before
    return claim.at(moved)


def _dropped(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    named = arguments(node)
    return None if named["p"] and named["train"] else claims.get(named["x"])


def _reversed(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """flip and roll of axes that tell neither rows nor columns."""
    named = named_arguments(node)
    source = node.args[0]
    assert isinstance(source, Node)
    claim, rank = claims.get(source), len(shape_of(source) or ())
    dims = named.get("dims") or range(rank)
    touched = {axis(d % rank) for d in ([dims] if isinstance(dims, int) else dims)}
    return None if claim is None or touched & claim.symbols else claim


def _batch_normalised(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    source = node.args[0]
    assert isinstance(source, Node)
    learning = named_arguments(node).get("training", False)
    others = list(node_inputs(list(node.args[1:])))
    return None if learning or any(n in claims for n in others) else claims.get(source)


Rule = Callable[[Node, Claims, Sizes], Shared | None]

RULES: dict[str, Rule] = {
    **dict.fromkeys(("full", "ones", "zeros", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"),
                    _constant),
    **dict.fromkeys(("softmax", "softmax_core", "log_softmax", "sum", "mean", "amax", "extreme", "logsumexp", "any", "all",
                     "topk", "reduction", "cumsum"), _along),
    **dict.fromkeys(("index", "index_select"), _indexed),
    **dict.fromkeys(("flip", "roll"), _reversed),
    "matmul": matmul, "linear": linear, "addmm": addmm, "embedding": _looked_up, "cat": _joined, "stack": _stacked,
    "gather": _gathered, "pad": _padded, "dropout": _dropped, "cast": _pointwise,
    "one_hot": lambda node, claims, batch: claims.get(arguments(node)["x"]),
}  # fmt: skip
"""By kind of the vocabulary."""

NAMED: dict[str, Rule] = {
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(("conv1d", "convolution", "conv2d"), convolution),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_normalised),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "argmax", "argmin",
                     "var", "var_mean", "std", "norm", "linalg_vector_norm", "amin", "prod", "glu"), _along),
    "softmax_attention": softmax_operator, "recurrence": recurrence_operator,
}  # fmt: skip
"""By operation, for what the vocabulary has no kind."""

RUNNING = {"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"}
"""Operations whose element at a column reads that column and those before."""

POINTWISE = {
    "add", "sub", "rsub", "mul", "div", "floordiv", "mod", "fmod", "neg", "abs", "sign", "floor", "ceil", "trunc", "round",
    "relu", "log", "isinf", "isfinite", "tanh", "exp", "reciprocal", "isnan", "nan_to_num", "where", "masked_fill",
    "maximum", "minimum", "le", "lt", "ge", "gt", "eq", "ne", "and", "or", "xor", "not", "clamp", "cast", "silu", "gelu",
    "sigmoid", "rsqrt", "sqrt", "pow", "sin", "cos", "softplus", "elu", "hardswish",
}  # fmt: skip
"""Operations of Dynamo's dialect that act element by element."""
