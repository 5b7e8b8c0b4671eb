"""New operations in a functional graph, with their values."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx.node import map_arg

from subquad.ir.graph import value_of

Node = torch.fx.Node
PLACE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def emit(place: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new operation in front of a node, with its fake value and that node's place in the code."""
    values = map_arg((args, kwargs), value_of)
    with value_of(place).fake_mode, torch.no_grad():
        return emit_as(place, target(*values[0], **values[1]), target, *args, **kwargs)


def emit_as(place: Node, value: Any, target: Any, *args: Any, **kwargs: Any) -> Node:
    """The same with a fake value that is given, for an operation that would fix symbolic sizes to compute its own."""
    with place.graph.inserting_before(place):
        made = place.graph.call_function(target, args, kwargs)
    made.meta = {key: place.meta[key] for key in PLACE if key in place.meta}
    made.meta["val" if "val" in place.meta else "example_value"] = value
    return made
