"""What is changed in torch while a forward is captured, and put back afterwards whatever happens."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from subquad.capture_nested import Nested


@contextmanager
def capturable() -> Iterator[Nested]:
    """Inside the block library code takes the path that a graph can hold and that gives the same numbers.

    The fused encoder layer and nested tensors of nn.TransformerEncoder are off, so that the graph holds a plain SDPA, and
    what the block is given says whether a forward would have taken nested tensors; masks are not compared with the causal
    one, which is only a hint beside the mask itself; a checkpointed region is an ordinary call, since nothing is recomputed
    without a backward pass; a scripted submodule runs the Python that it was made from; a module that moves itself to where
    it is stays; a condition on a length, as in `is_causal=length > 1`, is decided for the lengths that the capture holds
    for; `.data` is read as a detached tensor.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
        stack.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True
        nested = Nested()
        forward = torch.nn.TransformerEncoder.forward
        stack.enter_context(mock.patch.object(torch.nn.TransformerEncoder, "forward", nested.forward(forward)))
        stack.enter_context(mock.patch("torch.nn.modules.transformer._detect_is_causal_mask", _hinted))
        attend = torch.nn.functional.scaled_dot_product_attention
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", _decided(attend)))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", _moved_if_needed(torch.nn.Module.to)))
        scripted = torch.jit.RecursiveScriptModule
        stack.enter_context(mock.patch.object(scripted, "__getattribute__", _as_written, create=True))
        stack.enter_context(_Detached())
        yield nested


class _Detached(TorchFunctionMode):
    """`.data` is a detached tensor, which export records; what it gives by itself is a constant to export."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _hinted(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """The hint that the caller gave, and none where it gave none."""
    return is_causal is True


def _decided(attend: Any) -> Any:
    """SDPA whose `is_causal` may be a symbolic truth value, which torch's own parser refuses."""

    @functools.wraps(attend)
    def call(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: Any = False,
        **rest: Any,
    ) -> Any:
        return attend(query, key, value, attn_mask, dropout_p, bool(is_causal), **rest)

    return call


def _as_written(module: torch.jit.RecursiveScriptModule, name: str) -> Any:
    """An attribute of a scripted module, a method as its class has it in Python; what was traced or loaded stays compiled."""
    try:
        found = object.__getattribute__(module, name)
    except AttributeError:
        found = torch.jit.RecursiveScriptModule.__getattr__(module, name)
    if not isinstance(found, torch._C.ScriptMethod):
        return found
    kept = object.__getattribute__(module, "__dict__").get("_concrete_type")
    written = None if kept is None or isinstance(module, torch.jit.TracedModule) else kept.py_class
    if written is not None and name in vars(written):
        return functools.partial(vars(written)[name], module)
    return lambda *args, **kwargs: found(*args, **kwargs)


def _moved_if_needed(move: Any) -> Any:
    """`module.to(…)` that leaves a module alone whose tensors have the dtype and device already."""

    @functools.wraps(move)
    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        there = all(
            (device is None or x.device == device) and (dtype is None or x.dtype == dtype or not x.is_floating_point())
            for x in tensors
        )
        return module if there and layout is None else move(module, *args, **kwargs)

    return to
