"""Insert operator calls into a captured graph and record their fake values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import value_of

Node = torch.fx.Node


class Emitter:
    """Inserts nodes before one place and records their fake values."""

    def __init__(self, module: torch.fx.GraphModule, before: Node) -> None:
        self.graph, self.before = module.graph, before
        self.module = module

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert target(*args, **kwargs)."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        concrete = torch.fx.node.map_arg((args, kwargs), value_of)
        try:
            with _fake_mode(concrete), torch.no_grad():
                node.meta["val"] = target(*concrete[0], **concrete[1])
        except Exception:
            node.meta["val"] = None
        return node

    def attribute(self, target: str, value: torch.Tensor) -> Node:
        """Insert a get_attr of a parameter the graph module already holds."""
        with self.graph.inserting_before(self.before):
            node = self.graph.get_attr(target)
        mode = _mode_of(value_of(n) for n in self.graph.nodes)
        node.meta["val"] = value if mode is None else mode.from_tensor(value.detach(), static_shapes=True)
        return node


def _mode_of(values: Any) -> Any:
    for value in torch.utils._pytree.tree_leaves(list(values)):
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None


def _fake_mode(values: Any) -> Any:
    mode = _mode_of([values])
    return mode if mode is not None else torch.no_grad()
