"""Which tensors of a graph share memory with one that the graph writes to."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import node_inputs, value_of
from subquad.ir.vocabulary import module_of

Node = torch.fx.Node
HARMLESS = ("detach_", "requires_grad_", "retain_grad", "rename_")
IN_PLACE_OPERATORS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.setitem,
)  # fmt: skip


def written_nodes(graph: torch.fx.Graph) -> frozenset[Node]:
    """Nodes whose value some operation of the graph overwrites, wholly or in part, through any alias.

    Memory is compared on the recorded values.
    """
    targets = [target for node in graph.nodes for target in _written_arguments(node)]
    if not targets:
        return frozenset()
    places = {place for target in targets for place in _places(value_of(target))}
    return frozenset({*targets, *(node for node in graph.nodes if not places.isdisjoint(_places(value_of(node))))})


def _places(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        try:
            return {value.untyped_storage()._cdata}
        except (NotImplementedError, RuntimeError):
            return set()
    if isinstance(value, list | tuple):
        return set().union(*(_places(part) for part in value))
    return set()


def _written_arguments(node: Node) -> list[Node]:
    if node.op == "call_method":
        name = str(node.target)
        writes = (name.endswith("_") and not name.endswith("__") and name not in HARMLESS) or name == "__setitem__"
        return list(node_inputs(node.args[:1])) if writes or _augmented(name) else []
    if node.op == "call_module":
        return list(node_inputs(node.args[:1])) if getattr(module_of(node), "inplace", False) else []
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_by_schema(node, node.target)
    found = list(node_inputs(node.kwargs.get("out")))
    name = getattr(node.target, "__name__", "")
    plain = node.target in (operator.and_, operator.or_, operator.not_, operator.is_)
    in_place = not plain and name.endswith("_") and not name.endswith("__") and name not in HARMLESS
    if node.target in IN_PLACE_OPERATORS or in_place or node.kwargs.get("inplace") is True:
        found.extend(node_inputs(node.args[:1]))
    return found


def _augmented(name: str) -> bool:
    return name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")


def _written_by_schema(node: Node, target: torch._ops.OpOverload) -> list[Node]:
    if target._schema.name.removeprefix("aten::") in HARMLESS:
        return []
    found: list[Node] = []
    for place, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            found.extend(node_inputs(given))
    return found
