"""The body of a greedy `while_loop` with a draft in it: one pass over the buffer, then as many of the loop's own steps as held.

Each step is the original body's, on the logits of that one pass; a step is taken while the tokens before it came out as drafted
and the loop's own condition holds, so that buffer, counter, flags and stops are the original's (greedy verification, R0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from subquad.ir.graph import ancestors, value_of
from subquad.ir.refusal import Refusal
from subquad.passes.recognize.loop_carried import Carried

Node = torch.fx.Node
LONGEST = 3
"""Tokens at the end of the text that an earlier place should share, so that what followed it is drafted."""


def drafted(buffer: Tensor, counter: Tensor, depth: int) -> Tensor:
    """The buffer int64 [B, N] with `depth` guesses from the counter on, as far as there is room.

    The guesses follow the last earlier place where the longest end of the text, up to LONGEST tokens, stood before; behind the
    end of the text they go round (prompt lookup, Saxena 2023).  Where nothing matches, whatever stands there is guessed.
    """
    rows, room = buffer.shape
    last, places = counter.reshape(1) - 1, torch.arange(room, device=buffer.device)
    same, shared = torch.ones_like(buffer, dtype=torch.bool), torch.zeros_like(buffer)
    for back in range(LONGEST):
        end = buffer.index_select(1, (last - back).clamp(min=0))
        shifted = torch.cat([torch.full_like(buffer[:, :back], -1), buffer[:, : room - back]], 1)
        same = same & (shifted == end) & (places >= back)
        shared = shared + same
    score = torch.where(places < last, shared * room + places, places - room)
    best = score.argmax(1, keepdim=True)
    steps = torch.arange(depth, device=buffer.device)
    follow = best + 1 + steps % (last - best).clamp(min=1)
    guesses = buffer.gather(1, follow.clamp(max=room - 1))
    wide = torch.cat([buffer, torch.zeros_like(buffer[:, :1]).expand(rows, depth)], 1)
    return wide.index_copy(1, last + 1 + steps, guesses)[:, :room]


def came_true(buffer: Tensor, guessed: Tensor, place: Tensor) -> Tensor:
    """bool []: the token written at a place is the one that was guessed, in every row."""
    at = place.reshape(1)
    return (buffer.index_select(1, at) == guessed.index_select(1, at)).all()


def drafting_body(found: Carried, depth: int) -> torch.fx.GraphModule | Refusal:
    """The body that takes up to depth + 1 steps an iteration; a Refusal when the model cannot be told from the rest of it."""
    body = found.body
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    why = _model_part(found)
    if isinstance(why, Refusal):
        return why
    model = why
    example = [_example(n) for n in placeholders]
    graph = torch.fx.Graph()
    names = {old: _typed(graph.placeholder(old.name), old) for old in placeholders}
    carried, fixed = list(found.inputs), placeholders[len(found.inputs) :]
    at, held = carried.index(found.counter), carried.index(found.buffer)
    buffer, counter = example[placeholders.index(found.buffer)], example[placeholders.index(found.counter)]
    room = buffer.shape[1]
    (guessed,) = _traced(
        graph, lambda b, c: drafted(b, c, depth), (buffer, counter), [names[carried[held]], names[carried[at]]]
    )
    shared = _copied(graph, model, {**names, found.buffer: guessed})
    glue = [n for n in body.graph.nodes if n.op not in ("placeholder", "output") and n not in set(model)]

    def step(state: Sequence[Node]) -> list[Node]:
        known = {**names, **shared, **dict(zip(carried, state, strict=True))}
        copies = _copied(graph, glue, known)
        return [copies.get(out) or known[out] for out in found.outputs]

    state, place = step([names[n] for n in carried]), names[carried[at]]
    taken: Node | None = None
    for _ in range(depth):
        (true,) = _traced(graph, came_true, (buffer, buffer, counter), [state[held], guessed, place])
        goes_on = _inlined(graph, found.condition, [*state, *(names[n] for n in fixed)])[0]
        (inside, place) = _traced(graph, lambda c: ((c < room).all(), c.clamp(max=room - 1)), (counter,), [state[at]])
        taken = _all(graph, [n for n in (taken, true, goes_on, inside) if n is not None])
        after = step([place if n == at else one for n, one in enumerate(state)])
        state = [_where(graph, taken, new, old) for new, old in zip(after, state, strict=True)]
    graph.output(tuple(state))
    made = torch.fx.GraphModule(body, graph)
    graph.lint()
    return made


def _model_part(found: Carried) -> list[Node] | Refusal:
    """The nodes up to the logits: they read the buffer and what is fixed, and of them only the row is read behind."""
    assert found.row is not None
    logits = next((n for n in found.row.all_input_nodes if found.counter not in ancestors([n])), None)
    moving = (
        set(found.inputs)
        - {found.buffer}
        - {i for i, o in zip(found.inputs, found.outputs, strict=True) if _kept(i, o)}
    )
    part = [] if logits is None else [n for n in ancestors([logits]) if n.op != "placeholder"]
    if logits is None or moving & set(ancestors([logits])):
        return Refusal(
            found.node.name, "speculate", "the model reads the counter or a flag, not the buffer alone.", kind="loop"
        )
    inside = set(part)
    for node in part:
        outside = [user for user in node.users if user not in inside]
        if outside and found.buffer in ancestors([node]) and (node is not logits or outside != [found.row]):
            return Refusal(
                found.node.name,
                "speculate",
                f"`{node.name}` of the model is read beside the row of logits.",
                kind="loop",
            )
    return part


def _kept(old: Node, new: Node) -> bool:
    while new is not old and new.op == "call_function" and len(new.all_input_nodes) == 1:
        new = new.all_input_nodes[0]
    return new is old


def _copied(graph: torch.fx.Graph, nodes: Sequence[Node], known: Mapping[Node, Node]) -> dict[Node, Node]:
    copies: dict[Node, Node] = {}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n] if n in copies else known[n])
    return copies


def _inlined(graph: torch.fx.Graph, module: torch.fx.GraphModule, arguments: Sequence[Node]) -> list[Node]:
    """The outputs of a graph without attributes of its own, on these nodes."""
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    inner = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
    known = dict(zip(inputs, arguments, strict=True))
    copies = _copied(graph, inner, known)
    outputs = next(iter(reversed(module.graph.nodes))).args[0]
    flat = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    return [copies.get(n) or known[n] for n in flat]


def _traced(
    graph: torch.fx.Graph, function: Callable[..., Any], example: Sequence[Tensor], arguments: Sequence[Node]
) -> list[Node]:
    """A function's operations on these nodes; example: tensors of their shapes, each another one."""
    return _inlined(graph, make_fx(function, pre_dispatch=True)(*(x.clone() for x in example)), arguments)


def _example(node: Node) -> Tensor:
    value = value_of(node)
    return torch.zeros(value.shape, dtype=value.dtype)


def _typed(new: Node, old: Node) -> Node:
    new.meta = dict(old.meta)
    return new


def _all(graph: torch.fx.Graph, flags: Sequence[Node]) -> Node:
    found = flags[0]
    for flag in flags[1:]:
        found = graph.call_function(torch.ops.aten.logical_and.default, (found, flag))
    return found


def _where(graph: torch.fx.Graph, taken: Node, new: Node, old: Node) -> Node:
    return graph.call_function(torch.ops.aten.where.self, (taken, new, old))
