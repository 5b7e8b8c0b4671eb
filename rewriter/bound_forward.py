"""The forward of a rewritten module: runs the rewritten graph when the call is the captured one, else the original."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from subquad.capture import Capture, ProgramModule, ordered_inputs
from subquad.graph_copy import copy_capture
from subquad.ir.graph import attribute, hang


class BoundForward:
    """The forward of a rewritten module: runs the rewritten graph on the module's current parameters.

    A call with other arguments than the captured ones, in another dtype or device, or in training mode with dropout,
    runs the original forward and warns once, because the graph would not be the same function.
    """

    def __init__(self, root: nn.Module, capture: Capture) -> None:
        self.root, self.capture = root, capture
        self.signature = inspect.signature(type(root).forward)
        self.__signature__ = self.signature.replace(parameters=list(self.signature.parameters.values())[1:])
        self.attributes = [
            n.target for n in capture.graph.graph.nodes if n.op == "get_attr" and hasattr(root, n.target.split(".")[0])
        ]
        self.dtypes = {name: self._key(attribute(root, name)) for name in self.attributes}
        self.warned: set[str] = set()

    @staticmethod
    def _key(tensor: torch.Tensor) -> tuple[torch.dtype, str]:
        return tensor.dtype, tensor.device.type

    @property
    def __code__(self) -> CodeType:
        """The code object that torch.export looks for on a forward."""
        return type(self).__call__.__code__

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundForward:
        """The forward of the copied module, on its own copy of the graph."""
        copied = BoundForward.__new__(BoundForward)
        copied.__dict__.update(self.__dict__)
        copied.root = copy.deepcopy(self.root, memo)
        copied.capture = copy_capture(self.capture, lambda value: copy.deepcopy(value, memo))[0]
        copied.warned = set()
        return copied

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs, why = self.bound_inputs(args, kwargs)
        why = why or self.capture.guards.broken(inputs) or self._stale()
        if why is not None:
            if why not in self.warned:
                self.warned.add(why)
                warnings.warn(f"subquad ran the original forward of {type(self.root).__name__}: {why}.", stacklevel=2)
            return type(self.root).forward(self.root, *args, **kwargs)
        objects = self._objects(args, kwargs)
        leaves = self.capture.graph(*inputs)
        if self.capture.out_spec is None:
            return leaves
        if objects:
            return self.capture.out_spec.context.rebuild(leaves, into=objects)
        return pytree.tree_unflatten(list(leaves), self.capture.out_spec)

    def _objects(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments that are objects with tensors in them, which the call changes as the original does."""
        return self.capture.objects.among(args, kwargs) if self.capture.objects.recipes else []

    def _stale(self) -> str | None:
        if self.root.training and any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in self.root.modules()
        ):
            return "it is in training mode with dropout"
        for name in self.attributes:
            live = attribute(self.root, name)
            if self._key(live) != self.dtypes[name]:
                return f"{name} is now {live.dtype} on {live.device.type}, it was captured as {self.dtypes[name][0]}"
            if attribute(self.capture.graph, name) is not live:
                hang(self.capture.graph, name, live)
        return None

    def _default(self, name: str) -> Any:
        """What the forward takes for an argument that the capture did not give; None for one without a default."""
        parameter = self.signature.parameters.get(name)
        return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default

    def bound_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], str | None]:
        """The tensors of a call in the order of the graph, or why it is not the captured call."""
        if isinstance(self.root, ProgramModule):
            return ordered_inputs(self.capture, args, kwargs), None
        if name := self.capture.objects.unlike(args, kwargs):
            return [], f"it was captured with another kind of {name}"
        args, kwargs = self.capture.objects.as_tensors(args, kwargs)
        try:
            bound = self.signature.bind(self.root, *args, **kwargs)
        except TypeError as error:
            return [], str(error)
        bound.apply_defaults()
        leaves = dict(_named_leaves(self.signature, bound))
        inputs = []
        for name in self.capture.inputs:
            if not isinstance(leaves.get(name), torch.Tensor):
                return [], f"it was captured with a tensor `{name}`, which this call does not give"
            inputs.append(leaves.pop(name))
        for name, value in leaves.items():
            if isinstance(value, torch.Tensor):
                return [], f"it was captured without `{name}`"
            expected = self.capture.constants.get(name, self._default(name))
            if expected is not value and expected != value:
                return [], f"it was captured with {name}={expected!r}"
        return inputs, None


def _named_leaves(signature: inspect.Signature, bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """Arguments flattened under the names that torch.export gives its placeholders."""
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            for key, item in value.items():
                yield from _leaves(key, item)
        else:
            yield from _leaves(name, value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        for n, item in enumerate(value):
            yield from _leaves(f"{name}_{n}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}_{key}", item)
    else:
        yield name, value


HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def own_hooks(module: nn.Module) -> bool:
    """True when the module itself, not one below it, has hooks on its forward."""
    return any(module.__dict__[name] for name in HOOKS)


@contextmanager
def own_hooks_lifted(module: nn.Module) -> Iterator[None]:
    """Inside the block the module's own hooks do not run; they stay on its call, so its graph must not hold them too."""
    kept = {name: module.__dict__[name] for name in HOOKS}
    module.__dict__.update({name: OrderedDict() for name in HOOKS})
    try:
        yield
    finally:
        module.__dict__.update(kept)
