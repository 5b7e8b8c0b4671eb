"""Cut a step graph along its residual stream into programs, so that structurally equal layers share one.

A cut goes behind a stream value [B, w, ...] that is the only live result of the network so far: the post-dominator chain of
the stream.  The pieces between cuts are hashed over operations, wiring and constants; weights, states and side values
(rotary tables, positions, masks) are inputs.  The longest repetition of pieces makes the blocks.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import ancestors
from subquad.runtime.schedule import Call, Program, Schedule
from subquad.step_graph import STREAM

Node = torch.fx.Node
STATES = {"k", "v", "shared_k", "shared_v", "state", "window_k", "window_v", "seen"}
VIEWS = {"unsqueeze", "expand", "permute", "transpose", "slice", "squeeze", "t"}


def cut(module: torch.fx.GraphModule) -> Schedule:
    """Cut a step graph whose placeholders are shared inputs and then states named `<name>_<site>`.

    Returns a Schedule: one entry program from the shared inputs to the stream and the side values, then calls of programs
    stream → stream; the calls behind the last attention site are its tail, which may run on fewer tokens.
    """
    graph = module.graph
    main = _main_nodes(graph)
    cuts = _cut_points(graph, main)
    if not cuts:
        return _whole(module)
    pieces = [_Piece(module, main, start, end) for start, end in itertools.pairwise(cuts)]
    groups = _grouped([piece.key for piece in pieces], [bool(piece.states) for piece in pieces])
    if len(groups) > 1 and not any(piece.states for piece in pieces[: groups[0][1]]):
        cuts = cuts[groups[0][1] :]
        groups = [(a - groups[0][1], b - groups[0][1]) for a, b in groups[1:]]
    merged = [_Piece(module, main, cuts[a], cuts[b]) for a, b in groups]
    sides = list(dict.fromkeys(side for piece in merged for side in piece.sides))
    raw = [n for n in sides if n.op == "placeholder"]
    made = [n for n in sides if n.op != "placeholder"]
    entry = _entry(module, cuts[0], made)
    place = {node: n for n, node in enumerate([*made, *raw])}
    programs: dict[str, Program] = {}
    calls = []
    for piece in merged:
        program = programs.setdefault(piece.key, piece.program)
        calls.append(Call(program, tuple(place[s] for s in piece.sides), tuple(piece.weights), tuple(piece.states)))
    last = max((n for n, piece in enumerate(merged) if piece.states), default=-1)
    tail = last + 1
    if any(call.sides for call in calls[tail:]):
        tail = len(calls)
    return Schedule(entry, calls, tuple(str(n.target) for n in raw), tail)


def _whole(module: torch.fx.GraphModule) -> Schedule:
    """No cut was found: the graph is one program, called with the ids as its stream."""
    raw = [n for n in module.graph.nodes if n.op == "placeholder" and not _is_state(n)]
    main = {n for n in module.graph.nodes if n.op == "call_function"}
    piece = _Piece(module, main, raw[0], next(iter(reversed(module.graph.nodes))).args[0][0])
    entry = _entry(module, raw[0], [])
    sides = piece.sides
    call = Call(piece.program, tuple(range(len(sides))), tuple(piece.weights), tuple(piece.states))
    return Schedule(entry, [call], tuple(str(n.target) for n in sides), 1)


def _main_nodes(graph: torch.fx.Graph) -> set[Node]:
    """The nodes that the first stream value made from the token ids leads to, itself included."""
    ids = next(iter(graph.nodes))
    from_ids: set[Node] = {ids}
    main: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(n in main for n in node.all_input_nodes):
            main.add(node)
        elif not is_number(node) and any(n in from_ids for n in node.all_input_nodes):
            from_ids.add(node)
            if node.meta.get(STREAM):
                main.add(node)
    return main


def _cut_points(graph: torch.fx.Graph, main: set[Node]) -> list[Node]:
    order = {node: n for n, node in enumerate(graph.nodes)}
    logits = next(iter(reversed(graph.nodes))).args[0][0]
    end = len(order)
    reach, cuts = -1, []
    for node in graph.nodes:
        if node not in main:
            continue
        last = max((order[u] for u in node.users if u.op != "output"), default=-1)
        if node is logits:
            last = end
        if node.meta.get(STREAM) and reach <= order[node]:
            cuts.append(node)
        reach = max(reach, last)
        if node is logits:
            break
    return cuts if cuts and cuts[-1] is logits and len(cuts) > 1 else []


def is_number(node: Node) -> bool:
    """True for a size and for arithmetic on sizes."""
    if node.target is torch.ops.aten.sym_size.int:
        return True
    plain = node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"
    return plain and node.target is not operator.getitem


@dataclass
class _Piece:
    """The main nodes after `start` up to `end` as a program of their own."""

    module: torch.fx.GraphModule
    main: set[Node]
    start: Node
    end: Node
    sides: list[Node] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.body = torch.fx.Graph()
        self.stream = self.body.placeholder("stream")
        self.mapping: dict[Node, Node] = {self.start: self.stream}
        self.inputs: dict[str, list[Node]] = {"side": [], "weight": [], "state": []}
        order = list(self.module.graph.nodes)
        outputs = set(order[-1].args[0][1:])
        fresh = []
        for node in order[order.index(self.start) + 1 : order.index(self.end) + 1]:
            if node in self.main and node not in self.mapping:
                self.mapping[node] = self.body.node_copy(node, self._resolve)
                if node in outputs:
                    fresh.append(self.mapping[node])
        self.body.output((self.mapping[self.end], *fresh))
        self.program = self._finished(len(fresh))
        self.key = self.program.key

    def _resolve(self, node: Node) -> Node:
        """The node's value inside the piece: an input, or a copy of a size or view of one."""
        if node in self.mapping:
            return self.mapping[node]
        if node.op == "get_attr":
            self.weights.append(str(node.target))
            value = self._input("weight", node)
        elif node.op == "placeholder" and _is_state(node):
            self.states.append(str(node.target))
            value = self._input("state", node)
        elif node.target is torch.ops.aten.sym_size.int and _is_ids(node.args[0]):
            with self._front():
                value = self.body.call_function(node.target, (self.stream, node.args[1]))
        elif node not in self.main and (is_number(node) or _short(node) in VIEWS or _of_parameters(node)):
            for n in node.all_input_nodes:
                self._resolve(n)
            with self._front():
                value = self.body.node_copy(node, self._resolve)
                value.meta = {}
        else:
            self.sides.append(node)
            value = self._input("side", node)
        self.mapping[node] = value
        return value

    def _front(self) -> Any:
        last = next((n for n in reversed(self.body.nodes)), self.stream)
        return self.body.inserting_after(last)

    def _input(self, kind: str, node: Node) -> Node:
        value = self.body.placeholder(f"{kind}_{len(self.inputs[kind])}")
        self.inputs[kind].append(value)
        return value

    def _finished(self, fresh: int) -> Program:
        """Inputs in the order stream, sides, weights, states, and a hash of operations, wiring and constants."""
        graph = torch.fx.Graph()
        mapping: dict[Node, Node] = {}
        ordered = [self.stream, *self.inputs["side"], *self.inputs["weight"], *self.inputs["state"]]
        for node in ordered:
            mapping[node] = graph.placeholder(node.name)
        for node in self.body.nodes:
            if node.op == "call_function":
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            elif node.op == "output":
                graph.output(torch.fx.node.map_arg(node.args[0], lambda n: mapping[n]))
        counts = tuple(len(v) for v in self.inputs.values())
        return Program(graph, counts, fresh)


def _entry(module: torch.fx.GraphModule, first: Node, sides: list[Node]) -> Program:
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    names = []
    needed = ancestors([first, *sides])
    for node in needed:
        if node.op == "placeholder":
            mapping[node] = graph.placeholder(str(node.target))
    for node in needed:
        if node.op == "get_attr":
            names.append(str(node.target))
            mapping[node] = graph.placeholder(f"weight_{len(names) - 1}")
    for node in needed:
        if node not in mapping:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[n] for n in (first, *sides)))
    shared = sum(n.op == "placeholder" for n in graph.nodes) - len(names)
    return Program(graph, (shared, len(names), 0), 0, tuple(names))


def _grouped(keys: list[str], stateful: list[bool]) -> list[tuple[int, int]]:
    """Ranges of pieces: the repetition that covers most pieces, one range a period.

    What lies before and behind is cut by the same period as far as it has state; the rest before and behind is one range.
    """
    best = (0, 0, 0, 0)
    total = len(keys)
    for period in range(1, total // 2 + 1):
        run = 0
        for n in range(total - period):
            run = run + 1 if keys[n] == keys[n + period] else 0
            repeats = run // period + 1
            score = (repeats * period, -period)
            if run >= period and score > (best[0], -best[1] if best[1] else -total - 1):
                best = (repeats * period, period, n + period - repeats * period + 1, repeats)
    covered, period, start, repeats = best
    if not covered:
        return [(0, total)]
    ranges = [(start + i * period, start + (i + 1) * period) for i in range(repeats)]
    first = next((n for n in range(start) if stateful[n]), start)
    while ranges[0][0] > first:
        ranges.insert(0, (max(0, ranges[0][0] - period), ranges[0][0]))
    last = max((n for n in range(total) if stateful[n]), default=-1)
    while ranges[-1][1] <= last:
        ranges.append((ranges[-1][1], min(total, ranges[-1][1] + period)))
    before = [(0, ranges[0][0])] if ranges[0][0] else []
    behind = [(ranges[-1][1], total)] if ranges[-1][1] < total else []
    return [*before, *ranges, *behind]


def _of_parameters(node: Node) -> bool:
    """True for what is made of parameters element by element, as the `1 + weight` of a norm: it is made where it is read."""
    if node.op == "get_attr":
        return True
    alone = isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags or _short(node) in ("to", "_to_copy")
    )
    return alone and bool(node.all_input_nodes) and all(_of_parameters(n) for n in node.all_input_nodes)


def _is_ids(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder" and node is next(iter(node.graph.nodes))


def _is_state(node: Node) -> bool:
    name, _, number = str(node.target).rpartition("_")
    return number.isdigit() and name in STATES


def _short(node: Node) -> str:
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""
