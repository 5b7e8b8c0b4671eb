"""The body of a `while_loop` with a draft in it: one pass over the drafted tokens, then as many of the loop's own steps as held.

Each step is the original body's, on the logits of that one pass; a step is taken while the tokens before it came out as drafted
and the loop's own condition holds.  So buffer, counter, flags and stops are the original's, and because only the steps that are
taken draw, in order, so are its random numbers (sample and descend, which for argmax is greedy verification).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from subquad.ir.graph import value_of
from subquad.ir.refusal import Refusal
from subquad.passes.recognize.loop_carried import Carried
from subquad.passes.speculate.carried_pass import Part, committing, draws, example, model_part, wide_pass

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
    part = model_part(found)
    if isinstance(part, Refusal):
        return part
    body = found.body
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    graph = torch.fx.Graph()
    names = {old: _typed(graph.placeholder(old.name), old) for old in placeholders}
    buffer, counter = example(found.buffer), example(found.counter)
    (guessed,) = _traced(
        graph, lambda b, c: drafted(b, c, depth), (buffer, counter), [names[found.buffer], names[found.counter]]
    )
    try:
        shared, caches = _one_pass(graph, found, part, depth, guessed, names)
    except RuntimeError as error:
        return found.refuse(
            "speculate", f"the model cannot be run on several tokens at once ({str(error).splitlines()[0]})."
        )
    cached = {old for old, _ in found.caches}
    stepping = [(old, new) for old, new in zip(found.inputs, found.outputs, strict=True) if old not in cached]
    fixed = placeholders[len(found.inputs) :]
    given = [guessed, names[found.counter], *(shared[n] for n in part.read), *(names[n] for n in fixed)]
    made = torch.fx.GraphModule(body, graph)
    made.add_module("going", _going(len(stepping), len(given)))
    made.add_module("step", _step(found, part, stepping, fixed, depth))
    (going,) = _traced(graph, lambda c: torch.ones_like(c, dtype=torch.bool).all(), (counter,), [names[found.counter]])
    arguments = (
        graph.get_attr("going"),
        graph.get_attr("step"),
        (*(names[old] for old, _ in stepping), going),
        tuple(given),
    )
    ended = graph.call_function(torch.ops.higher_order.while_loop, arguments)
    after = {old: graph.call_function(operator.getitem, (ended, n)) for n, (old, _) in enumerate(stepping)}
    for old, new in found.caches:
        values = (example(old), example(old), counter, counter)
        nodes = [names[old], caches[new], names[found.counter], after[found.counter]]
        (after[old],) = _traced(graph, committing(found, old, new), values, nodes)
    graph.output(tuple(after[old] for old in found.inputs))
    graph.lint()
    made.recompile()
    return made


def _one_pass(
    graph: torch.fx.Graph, found: Carried, part: Part, depth: int, guessed: Node, names: Mapping[Node, Node]
) -> tuple[dict[Node, Node], dict[Node, Node]]:
    """What the rest of the body reads of one pass over all tokens, and the caches behind it."""
    if found.feed is None:
        copies = _copied(graph, part.nodes, {**names, found.buffer: guessed})
        return {n: copies[n] for n in part.read}, {}
    placeholders = list(names)
    values = [value_of(n).clone() for n in (found.buffer, *placeholders)]
    traced = make_fx(wide_pass(found, part, depth))(*values)
    made = _inlined(graph, traced, [guessed, *names.values()])
    count = len(part.read)
    return dict(zip(part.read, made[:count], strict=True)), dict(
        zip((new for _, new in found.caches), made[count:], strict=True)
    )


def _going(carried: int, fixed: int) -> torch.fx.GraphModule:
    """The condition of the steps: the last thing that they carry."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(f"arg{n}") for n in range(carried + 1 + fixed)]
    graph.output(graph.call_function(torch.ops.aten.clone.default, (inputs[carried],)))
    return torch.fx.GraphModule({}, graph)


def _step(
    found: Carried, part: Part, stepping: Sequence[tuple[Node, Node]], fixed: Sequence[Node], depth: int
) -> torch.fx.GraphModule:
    """One step of the loop's own body behind the model, on (state, going, guessed, first counter, what was read, fixed)."""
    graph, room = torch.fx.Graph(), value_of(found.buffer).shape[1]
    names = {old: _typed(graph.placeholder(old.name), old) for old, _ in stepping}
    graph.placeholder("going")
    guessed, start = graph.placeholder("guessed"), graph.placeholder("start")
    rows = {n: graph.placeholder(f"rows_of_{n.name}") for n in part.read}
    names |= {old: _typed(graph.placeholder(f"fixed_{old.name}"), old) for old in fixed}
    place, counter, buffer = names[found.counter], example(found.counter), example(found.buffer)
    if found.feed is not None:
        for node, wide in rows.items():
            values = (torch.zeros(depth + 1, *value_of(node).shape, dtype=value_of(node).dtype), counter, counter)
            (rows[node],) = _traced(graph, row_of, values, [wide, place, start])
    glue = _rest(found, part, [new for _, new in stepping])
    copies = _copied(graph, glue, {**names, **rows})
    known = {**names, **rows, **copies}
    state = [known[new] for _, new in stepping]
    after = dict(zip((old for old, _ in stepping), state, strict=True))
    (true,) = _traced(graph, came_true, (buffer, buffer, counter), [after[found.buffer], guessed, place])
    outer = [known.get(old, place) if old not in after else after[old] for old in found.inputs]
    goes_on = _inlined(graph, found.condition, [*outer, *(names[n] for n in fixed)])[0]
    (more,) = _traced(
        graph,
        lambda c, first: (c < room).all() & (c <= first + depth).all(),
        (counter, counter),
        [after[found.counter], start],
    )
    going = graph.call_function(torch.ops.aten.logical_and.default, (true, more))
    going = graph.call_function(torch.ops.aten.logical_and.default, (going, goes_on))
    graph.output((*state, going))
    graph.lint()
    return torch.fx.GraphModule(found.body, graph)


def _rest(found: Carried, part: Part, wanted: Sequence[Node]) -> list[Node]:
    """The body's nodes outside the model's part that its outputs need or that draw random numbers."""
    inside, needed = set(part.nodes), set()
    stack = [*wanted, *(n for n in found.body.graph.nodes if draws(n))]
    while stack:
        node = stack.pop()
        if node.op != "placeholder" and node not in inside and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in found.body.graph.nodes if n in needed]


def row_of(wide: Tensor, counter: Tensor, start: Tensor) -> Tensor:
    """The value at the counter of what was computed for all tokens from `start` on."""
    return wide.index_select(0, (counter - start).reshape(1)).squeeze(0)


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


def _typed(new: Node, old: Node) -> Node:
    new.meta = dict(old.meta)
    return new
