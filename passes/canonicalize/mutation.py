"""Recognise operations that write into a tensor, in every dialect, and give the new value they write as an expression."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from subquad.ir.graph import value_of

Node = torch.fx.Node
aten = torch.ops.aten

METADATA = frozenset({"detach_", "requires_grad_", "retain_grad", "share_memory_", "pin_memory_"})
"""Methods with a trailing underscore that change no element."""
RESHAPING = frozenset({"resize_", "resize_as_", "set_", "as_strided_", "t_", "transpose_", "swapaxes_", "swapdims_",
                       "squeeze_", "unsqueeze_"})  # fmt: skip
"""Methods that change the tensor's own shape, so that no value of the old shape can stand for it."""
AUGMENTED: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.imod: operator.mod,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.ipow: operator.pow,
    operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
    operator.ilshift: operator.lshift, operator.irshift: operator.rshift,
}  # fmt: skip
KEYWORDS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
"""Functions whose names end in an underscore because Python reserves the word."""


class Unsupported(Exception):
    """A write that has no functional form here; the message is the sentence for the user."""


@dataclass(frozen=True)
class Write:
    """One operation that writes.

    target: the node that is written, whose own value the node returns.  index: for an assignment, the index it writes at.
    value: for an assignment, what is written.  call: else, (op, target, args, kwargs) of the functional form, whose result,
    cast and expanded to the written tensor, is its new content; "clone" in place of the op stands for running the
    operation itself on a private copy.
    """

    target: Node
    call: tuple[str, Any, tuple[Any, ...], dict[str, Any]] | None = None
    index: Any = None
    value: Any = None


def writes_schema(target: Any) -> bool:
    """True for an ATen or custom operator whose schema says that it changes the content of an argument."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target._schema.is_mutable and target._schema.name.rpartition("::")[2] not in METADATA


def write_of(node: Node) -> Write | None:
    """What a node writes, or None when it writes nothing.

    Raises Unsupported for a write that cannot be expressed as a value.
    """
    if _sets_itself(node):
        return None
    if node.op == "call_method":
        return _method(node)
    if node.op == "call_module":
        return _module(node)
    if node.op == "call_function":
        return _overload(node) if isinstance(node.target, torch._ops.OpOverload) else _function(node)
    return None


def _sets_itself(node: Node) -> bool:
    """True for `set_` given the very tensor that it changes, as `module.to(dtype)` does where the dtype is the same.

    Recorded values do not say so by their memory, which `set_` gave the recorded value too, but by being one object.
    """
    if str(getattr(node.target, "__name__", node.target)) not in ("set_", "set_.source_Tensor"):
        return False
    one, other = node.args if len(node.args) == 2 else (None, None)
    return isinstance(one, Node) and isinstance(other, Node) and value_of(one) is value_of(other)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(value_of(node), torch.Tensor)


def _method(node: Node) -> Write | None:
    name, target = str(node.target), node.args[0]
    if name == "__setitem__":
        return _assignment(node)
    if not _is_tensor(target) or not name.endswith("_") or name.endswith("__") or name in METADATA:
        return None
    return _in_place(node, name)


def _in_place(node: Node, name: str) -> Write:
    """`x.name_(…)`, also as a function with a trailing underscore."""
    target, rest, kwargs = node.args[0], node.args[1:], dict(node.kwargs)
    assert isinstance(target, Node)
    if name == "set_":
        raise Unsupported("`set_` gives a tensor other memory; assign the other tensor instead")
    if name in RESHAPING:
        raise Unsupported(f"`{name}` changes the shape of a tensor in place; use `{name[:-1]}` and its result")
    if name == "copy_":
        return Write(target, index=(), value=rest[0] if rest else kwargs["src"])
    if name == "fill_":
        return Write(target, index=(), value=rest[0] if rest else kwargs["value"])
    if name == "zero_":
        return Write(target, index=(), value=0)
    plain = name.removesuffix("_")
    if hasattr(torch.Tensor, plain):
        return Write(target, ("call_method", plain, node.args, kwargs))
    return Write(target, ("clone", name, node.args, kwargs))


def _assignment(node: Node) -> Write | None:
    target, index, value = node.args
    if not isinstance(target, Node):
        raise Unsupported("an item is assigned in a list or dict that the graph builds")
    return Write(target, index=index, value=value)


def _module(node: Node) -> Write | None:
    """A leaf module with inplace=True runs on a private copy."""
    from subquad.ir.vocabulary import module_of

    target = node.args[0] if node.args else None
    if not getattr(module_of(node), "inplace", False) or not isinstance(target, Node):
        return None
    return Write(target, ("clone", node.target, node.args, dict(node.kwargs)))


def _function(node: Node) -> Write | None:
    function, name = node.target, str(getattr(node.target, "__name__", ""))
    if function is operator.setitem:
        return _assignment(node)
    if function in AUGMENTED:
        target = node.args[0]
        if not isinstance(target, Node) or not _is_tensor(target):
            return None
        return Write(target, ("call_function", AUGMENTED[function], node.args, {}))
    if node.kwargs.get("out") is not None:
        out = node.kwargs["out"]
        if not isinstance(out, Node):
            raise Unsupported(f"`{name}` writes its results into several tensors by out=")
        kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
        return Write(out, ("call_function", function, node.args, kwargs))
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, Node) or not _is_tensor(first):
        return None
    if name.endswith("_") and not name.endswith("__") and name not in METADATA and function not in KEYWORDS:
        twin = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
        if name in RESHAPING or not callable(twin):
            raise Unsupported(f"`{name}` writes into its argument and has no functional form")
        return Write(first, ("call_function", twin, node.args, dict(node.kwargs)))
    position = _inplace_position(function)
    if position is None:
        return None
    args, kwargs = list(node.args), dict(node.kwargs)
    if position < len(args):
        wanted, args[position] = args[position], False
    else:
        wanted, kwargs["inplace"] = kwargs.get("inplace", False), False
    return Write(first, ("call_function", function, tuple(args), kwargs)) if wanted else None


def _of_torch(function: Any) -> bool:
    """A function of torch itself: `operator.or_` writes nothing."""
    name = str(getattr(function, "__name__", ""))
    return str(getattr(function, "__module__", None)).startswith("torch") or getattr(torch, name, None) is function


def _inplace_position(function: Any) -> int | None:
    """Where `inplace` stands among the parameters of a torch.nn.functional function; None where there is none."""
    if not _of_torch(function):
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _overload(node: Node) -> Write | None:
    """An operator that writes by its schema; its functional overload is the one without the underscore or without out=."""
    overload: Any = node.target
    if not writes_schema(overload):
        return None
    schema = overload._schema
    name = schema.name.rpartition("::")[2]
    written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    values = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    target = values.get(written[0].name)
    if len(written) > 1 or overload.namespace != "aten" or not isinstance(target, Node):
        raise Unsupported(f"`{schema.name}` writes into its arguments and has no functional form")
    if name.endswith("_"):
        return _aten_in_place(node, overload, name, target)
    kwargs = {key: value for key, value in node.kwargs.items() if key != written[0].name}
    twin = _twin(overload, name, written[0].name)
    if twin is None:
        raise Unsupported(f"`{schema.name}` writes its result by out= and has no functional form")
    return Write(target, ("call_function", twin, node.args, kwargs))


def _aten_in_place(node: Node, overload: Any, name: str, target: Node) -> Write:
    if name in ("copy_", "fill_", "zero_"):
        value: Any = 0 if name == "zero_" else node.args[1]
        return Write(target, index=(), value=value)
    twin = _twin(overload, name[:-1])
    if twin is None or name in RESHAPING:
        raise Unsupported(f"`{overload._schema.name}` writes into its argument and has no functional form")
    return Write(target, ("call_function", twin, node.args, dict(node.kwargs)))


def _twin(overload: Any, name: str, dropped: str = "") -> Any:
    """The operator of this name that takes the same arguments, without the dropped one, and writes none of them."""
    packet: Any = getattr(aten, name, None)
    wanted = [(a.name, str(a.type)) for a in overload._schema.arguments if a.name != dropped]
    for found in [] if packet is None else packet.overloads():
        twin = getattr(packet, found)
        if not twin._schema.is_mutable and [(a.name, str(a.type)) for a in twin._schema.arguments] == wanted:
            return twin
    return None
