"""The number that a tensor of one element holds when nothing but constants makes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import attribute, shape_of

Node = torch.fx.Node
LONGEST = 16


def folded(node: Node, module: torch.nn.Module) -> float | None:
    """The value of a tensor with one element that constants and buffers determine, None when an input or parameter does."""
    try:
        value = _value(node, module, LONGEST)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return None


def _value(value: Any, module: torch.nn.Module, left: int) -> Any:
    if not isinstance(value, Node):
        return value
    shape = shape_of(value)
    if left == 0 or shape is None or any(not isinstance(size, int) or size != 1 for size in shape):
        raise ValueError("not one number")
    if value.op == "get_attr":
        held = attribute(module, str(value.target))
        if held.requires_grad or isinstance(held, torch.nn.Parameter):
            raise ValueError("a parameter")
        return held.detach()
    if value.op not in ("call_function", "call_method"):
        raise ValueError("an input")
    args = torch.fx.node.map_arg(value.args, lambda n: _value(n, module, left - 1))
    kwargs = torch.fx.node.map_arg(value.kwargs, lambda n: _value(n, module, left - 1))
    if value.op == "call_method":
        return getattr(args[0], str(value.target))(*args[1:], **kwargs)
    assert callable(value.target)
    return value.target(*args, **kwargs)
