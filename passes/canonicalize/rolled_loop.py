"""Roll up the calls of an unrolled loop: one module with a symbolic length stands in the place of their inlined copies."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn

from subquad.ir.graph import attribute
from subquad.ir.refusal import Refusal, user_line
from subquad.passes.recognize.loop_unrolled import Call, Unrolled, name_of

Node = torch.fx.Node
MODEL = "rolled_model"
SHAPING = ("view", "reshape", "expand")
"""Changes of shape whose leading size is the number of rows."""


@dataclass(frozen=True)
class Rolled:
    """A loop's graph that calls `model` once per token.

    graph: the same function as the unrolled graph.  model: what is called.  held: for each attribute of the model that is an
    input of the graph, the place of that input.
    """

    graph: torch.fx.GraphModule
    model: nn.Module
    held: dict[str, int]


class RolledModel(nn.Module):
    """What the copies of a model in an unrolled loop have in common."""

    def __init__(self, step: torch.fx.GraphModule) -> None:
        super().__init__()
        self.step = step

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [B, T]; returns what the model does."""
        out: torch.Tensor = self.step(ids)
        return out


class _Varies(Exception):
    """Two copies differ; holds the node of the first one."""


def rolled(module: torch.fx.GraphModule, found: Unrolled) -> Rolled | Refusal:
    """The loop with its calls rolled up, or what keeps the copies from being one module."""
    calls = found.calls
    if len(calls[0].nodes) == 1 and calls[0].out.op == "call_module":
        return Rolled(torch.fx.GraphModule(module, module.graph), module.get_submodule(str(calls[0].out.target)), {})
    copies = [[n for n in module.graph.nodes if n in call.nodes] for call in calls]
    try:
        step, outside = _one(module, calls, copies)
    except _Varies as odd:
        node = odd.args[0]
        source, code = user_line(node)
        reason = f"`{node.name}` of the model is not the same in every call."
        return Refusal(calls[0].path, "loop: model", reason, source, code, "loop")
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    held = {f"step.held_{n}": inputs.index(node) for n, node in enumerate(outside) if node.op == "placeholder"}
    model = RolledModel(step)
    return Rolled(_without(module, calls, model), model, held)


def _one(
    module: torch.fx.GraphModule, calls: Sequence[Call], copies: Sequence[Sequence[Node]]
) -> tuple[torch.fx.GraphModule, list[Node]]:
    """The module that every copy is at its own length, and the nodes outside that it reads."""
    first, call = copies[0], calls[0]
    leaving = {n for nodes, one in zip(copies, calls, strict=True) for n in nodes if set(n.users) - one.nodes}
    if leaving != {one.out for one in calls} or any(len(nodes) != len(first) for nodes in copies):
        raise _Varies(call.out)
    graph, outside = torch.fx.Graph(), list[Node]()
    ids = graph.placeholder("ids")
    ids.meta = dict(call.ids.meta)
    rows, length = graph.call_method("size", (ids, 0)), graph.call_method("size", (ids, 1))
    known: dict[Node, Node] = {call.ids: ids}
    places = [{node: n for n, node in enumerate(nodes)} for nodes in copies]

    def argument(node: Node, values: list[Any]) -> Any:
        """What stands for the values that an argument has in the copies."""
        if isinstance(values[0], Node):
            return input_of(node, values)
        if any(type(value) is not type(values[0]) for value in values):
            raise _Varies(node)
        if isinstance(values[0], (tuple, list)):
            if len({len(value) for value in values}) > 1:
                raise _Varies(node)
            return type(values[0])(argument(node, list(parts)) for parts in zip(*values, strict=True))
        if isinstance(values[0], slice):
            parts = zip(*((v.start, v.stop, v.step) for v in values), strict=True)
            return slice(*(argument(node, list(part)) for part in parts))
        if isinstance(values[0], dict):
            return {key: argument(node, [value.get(key) for value in values]) for key in values[0]}
        if all(value == values[0] for value in values):
            return values[0]
        start = values[0] - call_length if isinstance(values[0], int) else None
        if start is None or values != [values[0] + n for n in range(len(values))]:
            raise _Varies(node)
        return length if start == 0 else graph.call_function(operator.add, (length, start))

    def input_of(node: Node, values: list[Any]) -> Node:
        if any(value is not one.ids for value, one in zip(values, calls, strict=True)):
            inside = [place.get(value) for place, value in zip(places, values, strict=True)]
            if inside[0] is None and all(value is values[0] for value in values):
                return outer(node, values[0])
            if inside[0] is None or any(place != inside[0] for place in inside):
                raise _Varies(node)
        return known[values[0]]

    def outer(node: Node, value: Node) -> Node:
        if value not in known:
            if value.op not in ("placeholder", "get_attr"):
                raise _Varies(node)
            outside.append(value)
            known[value] = graph.get_attr(f"held_{len(outside) - 1}")
        return known[value]

    call_rows, call_length = (int(size) for size in call.ids.meta["example_value"].shape)
    for n, node in enumerate(first):
        alike = [nodes[n] for nodes in copies]
        if any((other.op, other.target) != (node.op, node.target) for other in alike):
            raise _Varies(node)
        args = argument(node, [other.args for other in alike])
        kwargs = argument(node, [dict(other.kwargs) for other in alike])
        if name_of(node) in SHAPING:
            args = _with_rows(args, call_rows, rows)
        known[node] = graph.create_node(node.op, node.target, tuple(args), kwargs, node.name)
    graph.output(known[call.out])
    made = torch.fx.GraphModule(_holder(module, outside), graph, "RolledModel")
    return made, outside


def _with_rows(args: Sequence[Any], count: int, rows: Node) -> list[Any]:
    """The arguments of a change of shape with a leading size of `count`, the rows of the call, as that number of rows."""
    first, *rest = args[1:] or (None,)
    if isinstance(first, (tuple, list)):
        return [args[0], _with_rows((None, *first), count, rows)[1:], *rest]
    same = isinstance(first, int) and not isinstance(first, bool) and first == count
    return [args[0], rows if same else first, *rest] if len(args) > 1 else list(args)


def _holder(module: torch.fx.GraphModule, outside: Sequence[Node]) -> nn.Module:
    """A module with the constants of the graph; what is an input of it is set when it runs."""
    holder = nn.Module()
    for n, node in enumerate(outside):
        value = attribute(module, str(node.target)) if node.op == "get_attr" else torch.empty(0)
        if node.type is nn.Parameter and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value)
        if isinstance(value, nn.Parameter):
            holder.register_parameter(f"held_{n}", value)
        else:
            holder.register_buffer(f"held_{n}", value)
    return holder


def _without(module: torch.fx.GraphModule, calls: Sequence[Call], step: nn.Module) -> torch.fx.GraphModule:
    """The graph with a call of the module in the place of each copy."""
    graph, known = torch.fx.Graph(), dict[Node, Node]()
    ends, inside = {call.out: call for call in calls}, {n for call in calls for n in call.nodes}
    for node in module.graph.nodes:
        if node in ends:
            known[node] = graph.call_module(MODEL, (known[ends[node].ids],))
            known[node].meta = dict(node.meta)
        elif node not in inside:
            known[node] = graph.node_copy(node, lambda n: known[n])
    reads = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")} - {MODEL}
    return torch.fx.GraphModule({MODEL: step, **{name: attribute(module, name) for name in reads}}, graph)


def escaping(module: torch.fx.GraphModule, found: Unrolled, choices: set[str]) -> Node | None:
    """A call whose logits leave the loop other than through a choice of tokens; None when only tokens do."""
    outs = {call.out for call in found.calls}
    output = next(iter(reversed(module.graph.nodes)))
    seen: set[Node] = set()
    stack = list(output.all_input_nodes)
    while stack:
        node = stack.pop()
        if node in outs:
            return node
        if node not in seen and name_of(node) not in choices:
            seen.add(node)
            stack += node.all_input_nodes
    return None
