"""Re-roll a decoding loop that was unrolled into a graph: equal segments, each from one call of the model to the next."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import ancestors, value_of
from subquad.ir.loop import Loop, Schedule, Slot
from subquad.ir.refusal import Refusal, user_line
from subquad.passes.recognize.loop_row import CHOICES, WORDS

Node = torch.fx.Node
LEAST = 2
"""Calls of one module that make a loop."""


@dataclass(frozen=True)
class Call:
    """One call of the model: its nodes (one for a leaf module), the node of the ids it is fed, and the node of its result."""

    path: str
    nodes: frozenset[Node]
    ids: Node
    out: Node


@dataclass(frozen=True)
class Unrolled:
    """An unrolled loop and its calls in order, for whoever replaces them."""

    loop: Loop
    calls: tuple[Call, ...]


def find_unrolled(graph: torch.fx.Graph) -> list[Unrolled | Refusal]:
    """The loops of a graph in which a module is called several times on ids that grow by what its logits give.

    A graph of symbolic_trace with the model as a leaf, or one of Dynamo, whose nodes carry the stack of their modules.
    """
    found: list[Unrolled | Refusal] = []
    for calls in _repeated(graph):
        segments = [_glue(one, two) for one, two in itertools.pairwise(calls)]
        if any(segment is None for segment in segments):
            continue
        shapes = [_shape(segment, one, two) for segment, one, two in zip(segments, calls, calls[1:], strict=False)]  # type: ignore[arg-type]
        odd = next((n for n, shape in enumerate(shapes) if shape != shapes[0]), None)
        if odd is not None:
            source, code = user_line(calls[odd].out)
            reason = f"what stands between calls {odd + 1} and {odd + 2} of the model differs from the calls before."
            found.append(Refusal(calls[0].path, "loop: processors", reason, source, code, "loop"))
            continue
        glue = segments[0]
        assert glue is not None
        made = _loop(calls, glue)
        found.append(made if isinstance(made, Refusal) else Unrolled(made, tuple(calls)))
    return found


def _repeated(graph: torch.fx.Graph) -> list[list[Call]]:
    """Calls of each module that is called at least twice, in order: leaf modules, or the outermost entries of module stacks."""
    leaves: dict[str, list[Call]] = {}
    stacked: dict[str, dict[str, list[Node]]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            ids = next((n for n in node.all_input_nodes), None)
            if ids is not None:
                leaves.setdefault(str(node.target), []).append(Call(str(node.target), frozenset({node}), ids, node))
        elif node.op not in ("placeholder", "output", "get_attr"):
            stack = node.meta.get("nn_module_stack") or {}
            if stack:
                key, entry = next(iter(stack.items()))
                stacked.setdefault(str(entry[0]), {}).setdefault(str(key), []).append(node)
    groups = [calls for calls in leaves.values() if len(calls) >= LEAST]
    for path, by_call in stacked.items():
        calls = [_inlined(path, nodes) for nodes in by_call.values()]
        if len(calls) >= LEAST and all(call is not None for call in calls):
            groups.append([call for call in calls if call is not None])
    return groups


def _inlined(path: str, nodes: list[Node]) -> Call | None:
    """The call that a group of inlined nodes makes: fed by one integer tensor from outside, read in one place."""
    inside = frozenset(nodes)
    fed = {n for node in nodes for n in node.all_input_nodes if n not in inside and _is_ids(n)}
    out = [node for node in nodes if any(user not in inside for user in node.users)]
    return Call(path, inside, fed.pop(), out[-1]) if len(fed) == 1 and out else None


def _is_ids(node: Node) -> bool:
    value = value_of(node)
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 2
        and not value.is_floating_point()
        and value.dtype != torch.bool
    )


def _glue(one: Call, two: Call) -> list[Node] | None:
    """The nodes from one call's result and ids to the next call's ids; None when the result is not among what they read."""
    found: list[Node] = []
    seen: set[Node] = set()
    reached = False
    stack = [two.ids]
    while stack:
        node = stack.pop()
        if node is one.out or node in one.nodes:
            reached = True
            continue
        if node in seen or node is one.ids or node.op in ("placeholder", "get_attr"):
            continue
        seen.add(node)
        found.append(node)
        stack.extend(node.all_input_nodes)
    return sorted(found) if reached else None


def _shape(glue: list[Node], one: Call, two: Call) -> tuple[Any, ...]:
    """Operations, wiring and constants of a segment, blind to node names."""
    names: dict[Node, Any] = {one.ids: "ids", one.out: "out", **{node: n for n, node in enumerate(glue)}}
    described = []
    for node in glue:
        arguments: Any = torch.fx.node.map_arg(
            (node.args, node.kwargs),
            lambda n: _Name(str(names.get(n, n.target if n.op in ("placeholder", "get_attr") else "?"))),  # type: ignore[arg-type, return-value]
        )
        described.append((node.op, str(node.target), repr(arguments)))
    return (*described, names.get(two.ids))


class _Name(str):
    def __repr__(self) -> str:
        return f"%{self}"


def _loop(calls: list[Call], glue: list[Node]) -> Loop | Refusal:
    last = calls[0].out
    source, code = user_line(last)
    slots = [(_word(node), node) for node in glue]
    choices = [(word, node) for word, node in slots if word in CHOICES]
    if not choices:
        reason = "no token is chosen from the logits between two calls of the model."
        return Refusal(calls[0].path, "loop: choice", reason, source, code, "loop")
    if not all(_joins(two.ids, one.ids, choices[-1][1]) for one, two in itertools.pairwise(calls[:2])):
        reason = "the next call's ids are not the ids before with the chosen token behind them."
        return Refusal(calls[0].path, "loop: write", reason, source, code, "loop")
    chosen = glue.index(choices[-1][1])
    before = [(word, node) for word, node in slots[:chosen] if word]
    return Loop(
        path=calls[0].path, origin="unrolled", source=source, model=_slot("module", last, calls[0].path),
        context=Slot("full prefix", calls[0].ids.name), select=_selected(glue, last),
        choice=_slot(*choices[-1]),
        processors=tuple(_slot(word, node) for word, node in before if word not in CHOICES), write=_slot("cat", calls[1].ids),
        bound=Slot("unrolled", f"{len(calls)} calls"), result=Slot("graph outputs"),
        schedules=(Schedule("derived cache", False, "the loop was unrolled; decorate the function that holds it"),),
        evidence=(f"{len(calls) - 1} equal segments between {len(calls)} calls of {calls[0].path}",),
    )  # fmt: skip


def _selected(glue: list[Node], out: Node) -> Slot:
    for node in glue:
        name = name_of(node)
        if name in ("getitem", "select", "slice") and "-1" in repr(node.args[1:]):
            return _slot("last row", node)
    return Slot("inside the model", out.name)


def _joins(node: Node, ids: Node, chosen: Node) -> bool:
    """True when the node is the ids with something computed from the chosen token behind them, along the tokens."""
    parts = node.args[0] if name_of(node) in ("cat", "concat", "concatenate", "hstack") and node.args else ()
    along = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) if name_of(node) != "hstack" else 1
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or along not in (1, -1):
        return False
    return parts[0] is ids and isinstance(parts[1], Node) and chosen in ancestors([parts[1]])


def _slot(kind: str, node: Node, detail: str = "") -> Slot:
    source, code = user_line(node)
    return Slot(kind, detail or code or node.name, source)


def _word(node: Node) -> str:
    name = name_of(node)
    if name in ("truediv", "itruediv", "div"):
        return "temperature"
    if name in ("cat", "squeeze", "to", "float", "max") or node.target is operator.getitem:
        return ""
    return WORDS.get(name, "")


def name_of(node: Node) -> str:
    """The plain name of a node's operation, whatever dialect it is from."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.partition("::")[2])
    target: Callable[..., Any] | str = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "")
