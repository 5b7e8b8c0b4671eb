"""`speculate` for decoding loops inside a graph: their bodies draft and verify, and the graph stays one exported program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from subquad.application import apply_plan, rewritten
from subquad.bound_forward import BoundForward
from subquad.capture import Capture
from subquad.fingerprint import fingerprint
from subquad.graph_copy import copy_capture
from subquad.ir.graph import ancestors, hang, value_of
from subquad.ir.loop_rewrite import LOOP, LoopRewrite
from subquad.ir.plan import Plan, Step
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report
from subquad.passes.recognize.loop_carried import Carried, find_carried, operation
from subquad.passes.speculate.carried_draft import drafting_body
from subquad.passes.speculate.carried_pass import Part, model_part, wide_pass

TOLERANCE = 1e-4
"""Largest relative change of a row of logits when later tokens change that counts as rounding."""


def rewrite_loops(captured: Capture, report: Report, loop: LoopRewrite) -> nn.Module | None:
    """The captured module with every decoding loop of its graph drafting, None when the graph holds no such loop.

    A loop that cannot draft, or whose model reads later tokens, stays as it is and is refused in the report.
    """
    found = [one for one in find_carried(captured.graph) if isinstance(one, Carried)]
    if not found:
        return None
    applied = copy_capture(captured)[0]
    steps = []
    for one in found:
        made = _drafting(captured, one, loop)
        if isinstance(made, Refusal):
            report.refused.append(made)
            continue
        hang(applied.graph, str(one.node.all_input_nodes[1].target), made)
        steps.append(Step(LOOP, loop.name, tuple(sorted(loop.knobs().items()))))
        report.applied.append({"path": one.node.name, "pass": str(loop), "contract": loop.contract.value, "mask": ""})
    report.plan = Plan(tuple(steps[:1]), fingerprint(captured.root))
    root = apply_plan(captured, [], report.plan, report)
    record = rewritten(root)
    assert record is not None
    if steps:
        record.applied = applied
        record.bound[""] = applied
        root.__dict__["forward"] = BoundForward(root, applied)
        report.notes.append("drafts are looked up in the loop's own buffer, inside the graph")
    return root


def _drafting(captured: Capture, found: Carried, loop: LoopRewrite) -> torch.fx.GraphModule | Refusal:
    may = next(one for one in found.loop.schedules if one.name == "draft and verify")
    if not may.applies:
        return Refusal(found.node.name, loop.name, f"{may.reason}.", kind="loop")
    shape = value_of(found.buffer).shape
    if len(shape) != 2 or not all(isinstance(size, int) for size in shape):
        reason = f"its buffer has the shape {list(shape)}; one of fixed sizes, rows by tokens, can hold drafts."
        return Refusal(found.node.name, loop.name, reason, kind="loop")
    depth = loop.num_speculative_tokens
    made = drafting_body(found, depth)
    if isinstance(made, Refusal):
        return made
    values = _arguments(captured, found)
    if found.feed is None and not _causal(found, values):
        return found.refuse(loop.name, "the logits of a token change with the tokens behind it, which are drafts here.")
    if found.feed is not None and (why := _apart(found, values, depth)) is not None:
        return found.refuse(loop.name, why)
    return made


def _causal(found: Carried, values: Sequence[Any]) -> bool:
    """True when no row of logits changes as tokens behind it change: tried at every place of the example's buffer."""
    part = model_part(found)
    assert isinstance(part, Part)
    run, given = _outputs(found, part.read), dict(zip(_inputs(found), values, strict=True))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        width = run(*given.values())[0].shape[-1]
        ids = torch.randint(width, given[found.buffer].shape, generator=source)
        (base,) = run(*{**given, found.buffer: ids}.values())
        for place in range(1, ids.shape[1]):
            other = ids.clone()
            other[:, place:] = torch.randint(width, other[:, place:].shape, generator=source)
            rows = run(*{**given, found.buffer: other}.values())[0][:, :place]
            if not _alike(rows, base[:, :place], float(base.abs().max())):
                return False
    return True


def _apart(found: Carried, values: Sequence[Any], depth: int) -> str | None:
    """Why one pass over several tokens is not the loop's passes over one each; None when it is, at several places.

    The caches hold random numbers at every place, so that a token which reads behind its own place is seen.
    """
    part, inputs = model_part(found), _inputs(found)
    assert isinstance(part, Part)
    assert found.feed is not None
    single = _outputs(found, [*part.read, *(new for _, new in found.caches)])
    wide, source, room = (
        wide_pass(found, part, depth),
        torch.Generator().manual_seed(0),
        value_of(found.buffer).shape[1],
    )
    given = dict(zip(inputs, values, strict=True))
    ids = torch.randint(_vocabulary(found, part, given), given[found.buffer].shape, generator=source)
    with torch.no_grad():
        for place in sorted({1, room // 2, max(1, room - 1 - depth), room - 1}):
            state = dict(given)
            for old, _ in found.caches:
                state[old] = torch.randn(given[old].shape, generator=source).to(given[old].dtype)
            state[found.buffer], state[found.counter] = ids, torch.full_like(given[found.counter], place)
            _fed(state, found, ids, place)
            together = wide(ids, *state.values())
            for n in range(min(depth + 1, room - place)):
                state[found.counter] = torch.full_like(given[found.counter], place + n)
                _fed(state, found, ids, place + n)
                alone = single(*state.values())
                state.update(zip((old for old, _ in found.caches), alone[len(part.read) :], strict=True))
                for node, many, one in zip(part.read, together, alone, strict=False):
                    if not _alike(many[n], one):
                        return f"`{node.name}` of several tokens in one pass is not what it is of one after another."
    return None


def _fed(state: dict[torch.fx.Node, Any], found: Carried, ids: Tensor, place: int) -> None:
    """Put the token in front of a place where the loop carries it."""
    feed = found.feed
    if feed in state:
        state[feed] = ids[:, place - 1].to(state[feed].dtype).reshape(state[feed].shape)


def _vocabulary(found: Carried, part: Part, given: Mapping[torch.fx.Node, Any]) -> int:
    """How many tokens the model knows: the rows of the table in which the fed one is looked up."""
    tables = [n for n in part.nodes if operation(n) == "embedding" and found.feed in ancestors([n])]
    return int(value_of(tables[0].all_input_nodes[0]).shape[0]) if tables else 2


def _alike(one: Tensor, other: Tensor, scale: float | None = None) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    one, other = one.nan_to_num(), other.nan_to_num()
    largest = float(other.abs().max()) if scale is None else scale
    return float((one - other).abs().max()) <= TOLERANCE * largest


def _inputs(found: Carried) -> list[torch.fx.Node]:
    return [n for n in found.body.graph.nodes if n.op == "placeholder"]


def _outputs(found: Carried, wanted: Sequence[torch.fx.Node]) -> torch.fx.GraphModule:
    """The body cut down to the values of some of its nodes."""
    graph = torch.fx.Graph()
    known = {node: graph.placeholder(node.name) for node in _inputs(found)}
    for node in ancestors(wanted):
        if node.op != "placeholder":
            known[node] = graph.node_copy(node, lambda n: known[n])
    graph.output(tuple(known[n] for n in wanted))
    return torch.fx.GraphModule(found.body, graph)


class _Reached(Exception):
    def __init__(self, arguments: list[Any]) -> None:
        self.arguments = arguments


class _UpTo(torch.fx.Interpreter):
    """Runs a graph up to a node, and raises what that node is called with."""

    def __init__(self, module: torch.fx.GraphModule, node: torch.fx.Node) -> None:
        super().__init__(module)
        self.node = node

    def run_node(self, n: torch.fx.Node) -> Any:
        if n is self.node:
            (_, _, carried, fixed), _ = self.fetch_args_kwargs_from_env(n)
            raise _Reached([*carried, *fixed])
        return super().run_node(n)


def _arguments(captured: Capture, found: Carried) -> list[Any]:
    """What the loop's node is called with for the example."""
    inputs = [captured.example[n.name] for n in captured.graph.graph.nodes if n.op == "placeholder"]
    try:
        with torch.no_grad():
            _UpTo(captured.graph, found.node).run(*(x.clone() for x in inputs))
    except _Reached as reached:
        return reached.arguments
    raise AssertionError("the loop's node was not reached")
