"""Insert operator calls into a captured graph and record their fake values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.fx

from subquad.ir.graph import value_of

Node = torch.fx.Node


class Emitter:
    """Inserts nodes before one place and records their fake values."""

    def __init__(self, module: torch.fx.GraphModule, before: Node) -> None:
        self.graph, self.before = module.graph, before
        self.module = module
        self.mode = next((mode for node in self.graph.nodes if (mode := _mode_of(value_of(node))) is not None), None)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert target(*args, **kwargs)."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        return self._recorded(node, target)

    def operation(self, like: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """Insert the operation of another node, a function or a method, on other arguments."""
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node(like.op, like.target, args, kwargs)
        if like.op == "call_method":
            return self._recorded(node, lambda x, *rest, **named: getattr(x, str(like.target))(*rest, **named))
        assert callable(like.target)
        return self._recorded(node, like.target)

    def attribute(self, target: str, value: torch.Tensor) -> Node:
        """Insert a get_attr of a parameter the graph module already holds."""
        with self.graph.inserting_before(self.before):
            node = self.graph.get_attr(target)
        node.meta["val"] = value if self.mode is None else self.mode.from_tensor(value.detach(), static_shapes=True)
        return node

    def _recorded(self, node: Node, run: Callable[..., Any]) -> Node:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
        leaves = tuple(_key(leaf) for leaf in torch.utils._pytree.tree_leaves((args, kwargs)))
        operation = node.op, str(node.target), *node.kwargs, *leaves
        known = _values.setdefault(self.mode, {}) if self.mode is not None else {}
        if operation not in known:
            known[operation] = self._run(run, args, kwargs)
        node.meta["val"] = known[operation]
        return node

    def _run(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            with self.mode if self.mode is not None else nullcontext(), torch.no_grad():
                return run(*args, **kwargs)
        except Exception:
            return None


_values: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""By fake mode, the values of operations already inserted: equal layers insert equal ones."""


def _key(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return str(value)
    return str(value.shape), str(value.stride()), value.dtype, value.device


def _mode_of(values: Any) -> Any:
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None
