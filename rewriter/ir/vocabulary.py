"""One table from three graph dialects (ATen, torch functions, methods and modules) to kinds with named arguments."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

REQUIRED = object()


@dataclass(frozen=True)
class Kind:
    """One kind of operation: its name, named arguments with defaults, and how the dialects spell it.

    aten: packet names under torch.ops.aten.  functions: callables that Dynamo or symbolic_trace put in a graph.
    methods: Tensor method names.  modules: nn.Module classes that symbolic_trace keeps as leaves.
    variadic: the last argument collects all remaining positional ones (`view(a, b, c)`).
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]
    aten: tuple[str, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type, ...] = ()
    variadic: bool = False
    aliases: dict[str, str] = field(default_factory=dict)


def _kind(
    name: str,
    arguments: str,
    aten: str = "",
    functions: tuple[Callable[..., Any], ...] = (),
    methods: str = "",
    modules: tuple[type, ...] = (),
    variadic: bool = False,
    **aliases: str,
) -> Kind:
    parsed: list[tuple[str, Any]] = []
    for word in arguments.split():
        key, _, default = word.partition("=")
        parsed.append((key, eval(default, {"inf": float("inf")}) if default else REQUIRED))
    return Kind(
        name, tuple(parsed), tuple(aten.split()), functions, tuple(methods.split()), modules, variadic, dict(aliases)
    )


KINDS: tuple[Kind, ...] = (
    _kind("softmax", "x dim=None dtype=None", "softmax _safe_softmax", (torch.softmax, F.softmax), "softmax",
          (torch.nn.Softmax,), input="x", self="x"),
    _kind("softmax_core", "x dim half_to_float", "_softmax", self="x"),
    _kind("sdpa", "q k v mask=None dropout=0.0 is_causal=False scale=None enable_gqa=False",
          "scaled_dot_product_attention", (F.scaled_dot_product_attention,), query="q", key="k", value="v",
          attn_mask="mask", dropout_p="dropout"),
    _kind("matmul", "a b", "matmul bmm mm", (torch.matmul, torch.bmm, operator.matmul, torch.mm), "matmul bmm mm __matmul__",
          input="a", self="a", other="b", mat2="b"),
    _kind("einsum", "equation operands", "einsum", (torch.einsum,)),
    _kind("inner", "a b", "inner", (torch.inner,), "inner", self="a", input="a", other="b"),
    _kind("cosine_similarity", "a b dim=1 eps=1e-8", "cosine_similarity", (F.cosine_similarity,), "", x1="a", x2="b"),
    _kind("baddbmm", "addend left right beta=1 alpha=1", "baddbmm baddbmm_", (torch.baddbmm,), "baddbmm baddbmm_",
          self="addend", input="addend", batch1="left", batch2="right"),
    _kind("mul", "a b", "mul mul_", (torch.mul, operator.mul, operator.imul, torch.multiply), "mul mul_ __mul__ __rmul__",
          self="a", input="a", other="b"),
    _kind("div", "a b rounding_mode=None", "div div_", (torch.div, operator.truediv, operator.itruediv),
          "div div_ __truediv__", self="a", input="a", other="b"),
    _kind("floordiv", "a b", "floor_divide", (torch.floor_divide, operator.floordiv), "floor_divide __floordiv__",
          self="a", input="a", other="b"),
    _kind("mod", "a b", "remainder", (torch.remainder, operator.mod), "remainder __mod__", self="a", input="a", other="b"),
    _kind("fmod", "a b", "fmod", (torch.fmod,), "fmod", self="a", input="a", other="b"),
    _kind("add", "a b alpha=1", "add add_", (torch.add, operator.add, operator.iadd), "add add_ __add__ __radd__",
          self="a", input="a", other="b"),
    _kind("sub", "a b alpha=1", "sub sub_", (torch.sub, operator.sub, operator.isub), "sub sub_ __sub__",
          self="a", input="a", other="b"),
    _kind("rsub", "a b alpha=1", "rsub", (torch.rsub,), "__rsub__", self="a", input="a", other="b"),
    _kind("neg", "x", "neg", (torch.neg, operator.neg), "neg __neg__", input="x", self="x"),
    _kind("abs", "x", "abs", (torch.abs, operator.abs), "abs", input="x", self="x"),
    _kind("sign", "x", "sign sgn", (torch.sign,), "sign", input="x", self="x"),
    _kind("floor", "x", "floor", (torch.floor,), "floor", input="x", self="x"),
    _kind("ceil", "x", "ceil", (torch.ceil,), "ceil", input="x", self="x"),
    _kind("trunc", "x", "trunc fix", (torch.trunc, torch.fix), "trunc fix", input="x", self="x"),
    _kind("round", "x", "round", (torch.round,), "round", input="x", self="x"),
    _kind("relu", "x", "relu", (torch.relu, F.relu), "relu", (torch.nn.ReLU,), input="x", self="x"),
    _kind("log", "x", "log", (torch.log,), "log", input="x", self="x"),
    _kind("isinf", "x", "isinf", (torch.isinf,), "isinf", input="x", self="x"),
    _kind("isfinite", "x", "isfinite", (torch.isfinite,), "isfinite", input="x", self="x"),
    _kind("tanh", "x", "tanh", (torch.tanh, F.tanh), "tanh", (torch.nn.Tanh,), input="x", self="x"),
    _kind("exp", "x", "exp exp_", (torch.exp,), "exp exp_", input="x", self="x"),
    _kind("exp2", "x", "exp2 special_exp2", (torch.exp2,), "exp2", input="x", self="x"),
    _kind("pow", "base exponent", "pow", (torch.pow, operator.pow), "pow __pow__", self="base", input="base"),
    _kind("reciprocal", "x", "reciprocal", (torch.reciprocal,), "reciprocal", input="x", self="x"),
    _kind("pad", "x pad mode='constant' value=0.0", "pad constant_pad_nd", (F.pad, torch._C._nn.pad), "", self="x", input="x"),
    _kind("isnan", "x", "isnan", (torch.isnan,), "isnan", input="x", self="x"),
    _kind("nan_to_num", "x nan=0.0", "nan_to_num nan_to_num_", (torch.nan_to_num,), "nan_to_num nan_to_num_", input="x",
          self="x"),
    _kind("where", "cond a b", "where", (torch.where,), "where", condition="cond", input="a", self="a", other="b"),
    _kind("masked_fill", "x mask value", "masked_fill masked_fill_", (torch.masked_fill,), "masked_fill masked_fill_",
          input="x", self="x"),
    _kind("maximum", "a b", "maximum max", (torch.maximum, torch.max), "maximum max", self="a", input="a", other="b"),
    _kind("minimum", "a b", "minimum min", (torch.minimum, torch.min), "minimum min", self="a", input="a", other="b"),
    _kind("le", "a b", "le less_equal", (torch.le, torch.less_equal, operator.le),
          "le less_equal __le__", self="a", input="a", other="b"),
    _kind("lt", "a b", "lt less", (torch.lt, torch.less, operator.lt),
          "lt less __lt__", self="a", input="a", other="b"),
    _kind("ge", "a b", "ge greater_equal", (torch.ge, torch.greater_equal, operator.ge),
          "ge greater_equal __ge__", self="a", input="a", other="b"),
    _kind("gt", "a b", "gt greater", (torch.gt, torch.greater, operator.gt),
          "gt greater __gt__", self="a", input="a", other="b"),
    _kind("eq", "a b", "eq", (torch.eq, operator.eq), "eq __eq__", self="a", input="a", other="b"),
    _kind("ne", "a b", "ne not_equal", (torch.ne, torch.not_equal, operator.ne),
          "ne not_equal __ne__", self="a", input="a", other="b"),
    _kind("and", "a b", "__and__ __iand__ bitwise_and bitwise_and_ logical_and",
          (torch.bitwise_and, torch.logical_and, operator.and_, operator.iand), "logical_and bitwise_and __and__ __iand__",
          self="a", input="a", other="b"),
    _kind("or", "a b", "__or__ __ior__ bitwise_or bitwise_or_ logical_or",
          (torch.bitwise_or, torch.logical_or, operator.or_, operator.ior), "logical_or bitwise_or __or__ __ior__",
          self="a", input="a", other="b"),
    _kind("xor", "a b", "__xor__ __ixor__ bitwise_xor logical_xor",
          (torch.bitwise_xor, torch.logical_xor, operator.xor, operator.ixor), "logical_xor bitwise_xor __xor__ __ixor__",
          self="a", input="a", other="b"),
    _kind("not", "x", "bitwise_not logical_not", (torch.bitwise_not, torch.logical_not, operator.invert),
          "logical_not bitwise_not __invert__", input="x", self="x"),
    _kind("arange", "first second=None step=1", "arange", (torch.arange,), end="second", start="first"),
    _kind("full", "size value", "full", (torch.full,), fill_value="value"),
    _kind("ones", "size", "ones", (torch.ones,), variadic=True),
    _kind("zeros", "size", "zeros", (torch.zeros,), variadic=True),
    _kind("new_ones", "x size", "new_ones", (), "new_ones", self="x", variadic=True),
    _kind("new_zeros", "x size", "new_zeros", (), "new_zeros", self="x", variadic=True),
    _kind("new_full", "x size value", "new_full", (), "new_full", self="x", fill_value="value"),
    _kind("ones_like", "x", "ones_like", (torch.ones_like,), self="x", input="x"),
    _kind("zeros_like", "x", "zeros_like", (torch.zeros_like,), self="x", input="x"),
    _kind("full_like", "x value", "full_like", (torch.full_like,), self="x", input="x", fill_value="value"),
    _kind("scalar_tensor", "value", "scalar_tensor", (torch.scalar_tensor, torch.tensor), s="value", data="value"),
    _kind("tril", "x diagonal=0", "tril", (torch.tril,), "tril", input="x", self="x"),
    _kind("triu", "x diagonal=0", "triu", (torch.triu,), "triu", input="x", self="x"),
    _kind("eye", "n m=None", "eye", (torch.eye,)),
    _kind("cumsum", "x dim", "cumsum", (torch.cumsum,), "cumsum", input="x", self="x"),
    _kind("diff", "x n=1 dim=-1 prepend=None append=None", "diff", (torch.diff,), "diff", input="x", self="x"),
    _kind("cast", "x to=None", "to type_as _to_copy type", (), "to type float bool int long half bfloat16 double type_as",
          self="x", variadic=True),
    _kind("dropout", "x p=0.5 train=True", "dropout", (torch.dropout, F.dropout), "", (torch.nn.Dropout,),
          input="x", training="train", self="x"),
    _kind("unsqueeze", "x dim", "unsqueeze", (torch.unsqueeze,), "unsqueeze", input="x", self="x"),
    _kind("squeeze", "x dim=None", "squeeze", (torch.squeeze,), "squeeze", input="x", self="x"),
    _kind("expand", "x size", "expand broadcast_to", (torch.broadcast_to,), "expand broadcast_to", self="x", input="x",
          variadic=True),
    _kind("expand_as", "x other", "expand_as", (), "expand_as", self="x"),
    _kind("repeat", "x size", "repeat tile", (torch.tile,), "repeat tile", self="x", input="x", repeats="size", dims="size",
          variadic=True),
    _kind("view", "x size", "view reshape _unsafe_view view_as reshape_as", (torch.reshape,),
          "view reshape view_as reshape_as", self="x", input="x", shape="size",
          variadic=True),
    _kind("flatten", "x start_dim=0 end_dim=-1", "flatten", (torch.flatten,), "flatten", input="x", self="x"),
    _kind("unflatten", "x dim sizes", "unflatten", (torch.unflatten,), "unflatten", input="x", self="x"),
    _kind("transpose", "x dim0 dim1", "transpose swapaxes swapdims", (torch.transpose, torch.swapaxes, torch.swapdims),
          "transpose swapaxes swapdims",
          input="x", self="x", axis0="dim0", axis1="dim1"),
    _kind("t", "x", "t mT", (torch.t,), "t", input="x", self="x"),
    _kind("reversed", "x", "numpy_T", (), "", input="x", self="x"),
    _kind("permute", "x dims", "permute", (torch.permute,), "permute", input="x", self="x", variadic=True),
    _kind("movedim", "x source destination", "movedim moveaxis", (torch.movedim, torch.moveaxis), "movedim moveaxis",
          self="x", input="x"),
    _kind("unbind", "x dim=0", "unbind", (torch.unbind,), "unbind", self="x", input="x"),
    _kind("slice", "x dim=0 start=None end=None step=1", "slice", self="x"),
    _kind("select", "x dim index", "select", (torch.select,), "select", input="x", self="x"),
    _kind("narrow", "x dim start length", "narrow", (torch.narrow,), "narrow", input="x", self="x"),
    _kind("split", "x size dim=0", "split", (torch.split,), "split", tensor="x", self="x", split_size_or_sections="size",
          split_size="size", split_sizes="size"),
    _kind("split_with_sizes", "x size dim=0", "split_with_sizes", (), "split_with_sizes", self="x", split_sizes="size"),
    _kind("chunk", "x chunks dim=0", "chunk", (torch.chunk,), "chunk", input="x", self="x"),
    _kind("getitem", "x index", "", (operator.getitem,), "__getitem__"),
    _kind("index", "x indices", "index", self="x"),
    _kind("index_select", "x dim index", "index_select", (torch.index_select,), "index_select", self="x", input="x"),
    _kind("gather", "x dim index", "gather", (torch.gather,), "gather", self="x", input="x"),
    _kind("gather", "x index dim=None", "take_along_dim", (torch.take_along_dim,), "take_along_dim", self="x", input="x",
          indices="index"),
    _kind("isin", "x among invert=False", "isin", (torch.isin,), "", elements="x", test_elements="among",
          element="x", test_element="among"),
    _kind("one_hot", "x num_classes=-1", "one_hot", (F.one_hot,), "", self="x", tensor="x"),
    _kind("outer", "a b", "outer ger", (torch.outer,), "outer", self="a", input="a", vec2="b"),
    _kind("kron", "a b", "kron", (torch.kron,), "kron", self="a", input="a", other="b"),
    _kind("flip", "x dims", "flip", (torch.flip,), "flip", self="x", input="x", variadic=True),
    _kind("roll", "x shifts dims=()", "roll", (torch.roll,), "roll", self="x", input="x"),
    _kind("meshgrid", "tensors", "meshgrid", (torch.meshgrid,), variadic=True),
    _kind("broadcast_tensors", "tensors", "broadcast_tensors", (torch.broadcast_tensors,), variadic=True),
    _kind("slice_scatter", "x src dim=0 start=None end=None step=1", "slice_scatter", (torch.slice_scatter,),
          "slice_scatter", self="x", input="x"),
    _kind("select_scatter", "x src dim index", "select_scatter", (torch.select_scatter,), "select_scatter", self="x", input="x"),
    _kind("index_put", "x indices values accumulate=False", "index_put", (torch.index_put,), "index_put", self="x", input="x"),
    _kind("copy", "x src", "copy", (), self="x"),
    _kind("fill", "x value", "fill", (torch.fill,), "", self="x", input="x"),
    _kind("contiguous", "x", "contiguous clone alias detach lift_fresh_copy detach_ lift_fresh",
          (torch.clone, torch.detach), "contiguous clone detach", (torch.nn.Identity,), self="x", input="x"),
    _kind("repeat_interleave", "x repeats dim=None output_size=None", "repeat_interleave", (torch.repeat_interleave,),
          "repeat_interleave", self="x", input="x"),
    _kind("stack", "tensors dim=0", "stack", (torch.stack,)),
    _kind("cat", "tensors dim=0", "cat concat concatenate", (torch.cat, torch.concat, torch.concatenate), "", dim="dim"),
    _kind("hstack", "tensors", "hstack", (torch.hstack,)),
    _kind("vstack", "tensors", "vstack row_stack", (torch.vstack,)),
    _kind("sym_size", "x dim=None", "sym_size", (), "size", self="x"),
    _kind("linear", "x weight bias=None", "linear", (F.linear,), "", (), input="x"),
    _kind("addmm", "bias x weight beta=1 alpha=1", "addmm", (torch.addmm,), "addmm", input="bias", self="bias", mat1="x",
          mat2="weight"),
    _kind("embedding", "weight indices", "embedding", (), "", ()),
    _kind("topk", "x k dim=-1", "topk", (torch.topk,), "topk", input="x", self="x"),
    _kind("sum", "x dim=None keepdim=False", "sum", (torch.sum,), "sum", self="x", input="x"),
    _kind("mean", "x dim=None keepdim=False", "mean", (torch.mean,), "mean", self="x", input="x"),
    _kind("amax", "x dim=None keepdim=False", "amax", (torch.amax,), "amax", self="x", input="x"),
    _kind("extreme", "x dim=None keepdim=False", self="x", input="x"),
    _kind("logsumexp", "x dim keepdim=False", "logsumexp", (torch.logsumexp,), "logsumexp", self="x", input="x"),
    _kind("logaddexp", "a b", "logaddexp", (torch.logaddexp,), "logaddexp", self="a", input="a", other="b"),
    _kind("any", "x dim=None keepdim=False", "any", (torch.any,), "any", self="x", input="x"),
    _kind("all", "x dim=None keepdim=False", "all", (torch.all,), "all", self="x", input="x"),
    _kind("clamp", "x min=None max=None", "clamp clamp_ clamp_min clamp_max", (torch.clamp, torch.clip), "clamp clamp_ clip",
          self="x", input="x"),
    _kind("reduction", "x dim=None", "mean argmax sort cumprod prod",
          (torch.mean, torch.argmax, torch.sort), "mean argmax sort", self="x", input="x"),
    _kind("log_softmax", "x dim=None", "log_softmax _log_softmax", (F.log_softmax, torch.log_softmax), "log_softmax",
          (torch.nn.LogSoftmax,), self="x", input="x"),
    _kind("assertion", "x", "_assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range "
          "sym_constrain_range_for_size", ()),
)  # fmt: skip

NUMPY = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
"""Argument names that torch's own functions and methods take in the place of theirs."""

_IRREGULAR = frozenset(["einsum", "arange", "cast", "view", "maximum", "minimum", "assertion"])
"""Kinds whose arguments are read in another way than by their names in the schema."""

_BY_PACKET: dict[str, Kind] = {}
_BY_FUNCTION: dict[Any, Kind] = {}
_BY_METHOD: dict[str, Kind] = {}
_BY_MODULE: dict[type, Kind] = {}
_BY_ATTRIBUTE: dict[str, Kind] = {}
for _k in KINDS:
    for _n in _k.aten:
        _BY_PACKET.setdefault(_n, _k)
    for _f in _k.functions:
        _BY_FUNCTION.setdefault(_f, _k)
    for _n in _k.methods:
        _BY_METHOD.setdefault(_n, _k)
    for _m in _k.modules:
        _BY_MODULE.setdefault(_m, _k)
    _BY_ATTRIBUTE.update({"t": {"mT": _k}, "reversed": {"T": _k}}.get(_k.name, {}))
_EXTREME = next(k for k in KINDS if k.name == "extreme")


def module_of(node: torch.fx.Node) -> torch.nn.Module | None:
    """The module that a call_module node calls, or None when its graph has no owner."""
    owner = node.graph.owning_module
    if owner is None or node.op != "call_module":
        return None
    return owner.get_submodule(str(node.target))


def lookup(node: torch.fx.Node) -> Kind | None:
    """The kind of a node in any dialect, or None when the vocabulary does not know it."""
    found = _spelled(node)
    if found is not None and found.name in ("maximum", "minimum") and not _of_two(node):
        return _EXTREME
    return found


def _of_two(node: torch.fx.Node) -> bool:
    """max and min compare two tensors, or reduce one, to values or to values and indices, which only the arguments tell."""
    if isinstance(node.target, torch._ops.OpOverload):
        return len(node.target._schema.arguments) > 1 and node.target._schema.arguments[1].name == "other"
    return "other" in node.kwargs or (len(node.args) > 1 and isinstance(node.args[1], torch.fx.Node))


def _spelled(node: torch.fx.Node) -> Kind | None:
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target.namespace != "aten":
                return None
            return _overload_kind(node.target)
        if node.target is getattr:
            return _BY_ATTRIBUTE.get(str(node.args[1]))
        try:
            return _BY_FUNCTION.get(node.target)
        except TypeError:
            return None
    if node.op == "call_method":
        return _BY_METHOD.get(str(node.target))
    if node.op == "call_module":
        module = module_of(node)
        return _BY_MODULE.get(type(module)) if module is not None else None
    return None


@functools.cache
def _overload_kind(overload: torch._ops.OpOverload) -> Kind | None:
    """The kind of an ATen overload; None for one that lacks what its namesakes require, as where(condition) does."""
    found = _BY_PACKET.get(overload._schema.name.removeprefix("aten::"))
    if found is None or found.name in _IRREGULAR:
        return found
    given = {found.aliases.get(a.name, a.name) for a in overload._schema.arguments}
    return found if all(name in given for name, default in found.arguments if default is REQUIRED) else None


def kind(node: Any) -> str:
    """The kind's name; "" for a placeholder, an attribute, or an operation outside the vocabulary."""
    found = lookup(node) if isinstance(node, torch.fx.Node) else None
    return found.name if found else ""


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The node's arguments by the kind's names, with defaults filled in.

    For a module leaf (nn.Softmax, nn.Dropout) the settings come from the module.  Keyword arguments that are not in the
    table (dtype=, device=, layout= of a factory) are kept under their own names.
    Raises KeyError when the node has no kind.
    """
    found = lookup(node)
    if found is None:
        raise KeyError(f"{node.target} is not in the vocabulary")
    if node.op == "call_module":
        module = module_of(node)
        named: dict[str, Any] = {"x": node.args[0]}
        if found.name in ("softmax", "log_softmax"):
            named["dim"] = module.dim  # type: ignore[union-attr]
        if found.name == "dropout":
            named["p"], named["train"] = module.p, module.training  # type: ignore[union-attr]
        positional: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
    else:
        named = {}
        positional, keywords = tuple(node.args), dict(node.kwargs)
    names = [name for name, _ in found.arguments]
    if found.name == "einsum":
        rest = positional[1:]
        operands = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else list(rest)
        return {"equation": positional[0], "operands": operands}
    if found.name == "arange":
        return _arange(positional, keywords)
    if found.name == "where" and node.op == "call_method":
        positional = (positional[1], positional[0], *positional[2:])
    if found.name == "cast":
        return _cast(node, positional, keywords)
    if isinstance(node.target, torch._ops.OpOverload):
        schema = [a.name for a in node.target._schema.arguments]
        for name, value in zip(schema, positional, strict=False):
            named[found.aliases.get(name, name)] = value
        if found.name in ("view", "expand") and "size" not in named:
            named["size"] = positional[1]
    elif found.variadic and len(positional) >= len(names):
        named.update(zip(names[:-1], positional, strict=False))
        rest = positional[len(names) - 1 :]
        named[names[-1]] = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple, torch.Size)) else list(rest)
    elif found.name in ("softmax", "log_softmax") and node.op == "call_function":
        named.update(zip(("x", "dim"), positional, strict=False))
    else:
        named.update(zip(names, positional, strict=False))
    for key, value in keywords.items():
        known = key in names or key in found.aliases
        key = key if known else NUMPY.get(key, key)
        named[found.aliases.get(key, key)] = value
    for name, default in found.arguments:
        if name not in named:
            if default is REQUIRED:
                raise KeyError(f"{node.format_node()} lacks its argument {name!r}")
            named[name] = default
    return named


def _arange(positional: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    start: Any = 0
    step: Any = 1
    if len(positional) == 1:
        end = positional[0]
    elif len(positional) >= 2:
        start, end = positional[:2]
        step = positional[2] if len(positional) > 2 else 1
    else:
        end = keywords["end"]
    start, end, step = keywords.get("start", start), keywords.get("end", end), keywords.get("step", step)
    return {"start": start, "end": end, "step": step, "dtype": keywords.get("dtype")}


_METHOD_DTYPES = {
    "float": torch.float32, "bool": torch.bool, "int": torch.int32, "long": torch.int64, "half": torch.float16,
    "bfloat16": torch.bfloat16, "double": torch.float64,
}  # fmt: skip


def _cast(node: torch.fx.Node, positional: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    dtype = keywords.get("dtype")
    if node.op == "call_method":
        dtype = _METHOD_DTYPES.get(str(node.target), dtype)
    for value in positional[1:]:
        if isinstance(value, torch.dtype):
            dtype = value
    return {"x": positional[0] if positional else keywords["self"], "dtype": dtype}
