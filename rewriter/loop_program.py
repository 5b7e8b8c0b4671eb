"""`speculate` for decoding loops inside a graph: their bodies draft and verify, and the graph stays one exported program."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from subquad.application import apply_plan, rewritten
from subquad.bound_forward import BoundForward
from subquad.capture import Capture
from subquad.fingerprint import fingerprint
from subquad.graph_copy import copy_capture
from subquad.ir.graph import ancestors, attribute, hang, value_of
from subquad.ir.loop_rewrite import LOOP, LoopRewrite
from subquad.ir.plan import Plan, Step
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report
from subquad.passes.recognize.loop_carried import Carried, find_carried
from subquad.passes.speculate.carried_draft import drafting_body

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
    made = drafting_body(found, loop.num_speculative_tokens)
    if isinstance(made, torch.fx.GraphModule) and not _causal(captured, found):
        return Refusal(
            found.node.name, loop.name, "the logits of a token change with the tokens behind it, which are drafts here.",
            kind="loop",
        )  # fmt: skip
    return made


def _causal(captured: Capture, found: Carried) -> bool:
    """True when no row of logits changes as tokens behind it change: tried at every place of the example's buffer."""
    assert found.row is not None
    logits = next(n for n in found.row.all_input_nodes if found.counter not in ancestors([n]))
    graph = torch.fx.Graph()
    known: dict[torch.fx.Node, torch.fx.Node] = {}
    inputs = [n for n in found.body.graph.nodes if n.op == "placeholder"]
    for node in inputs:
        known[node] = graph.placeholder(node.name)
    for node in ancestors([logits]):
        if node.op != "placeholder":
            known[node] = graph.node_copy(node, lambda n: known[n])
    graph.output(known[logits])
    run = torch.fx.GraphModule(found.body, graph)
    values = dict(zip(inputs, _values(captured, found), strict=True))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        width = run(*values.values()).shape[-1]
        ids = torch.randint(width, values[found.buffer].shape, generator=source)
        base = run(*{**values, found.buffer: ids}.values())
        for place in range(1, ids.shape[1]):
            other = ids.clone()
            other[:, place:] = torch.randint(width, other[:, place:].shape, generator=source)
            rows = run(*{**values, found.buffer: other}.values())[:, :place]
            if float((rows - base[:, :place]).abs().max()) > TOLERANCE * float(base.abs().max()):
                return False
    return True


def _values(captured: Capture, found: Carried) -> list[Tensor]:
    """What the loop's node is called with: inputs of the example, parameters, and zeros for what the graph computes."""
    return [_value(captured, node) for node in found.node.all_input_nodes[2:]]


def _value(captured: Capture, node: torch.fx.Node) -> Tensor:
    if node.op == "get_attr":
        return attribute(captured.graph, str(node.target))  # type: ignore[no-any-return]
    if node.op == "placeholder" and node.name in captured.example:
        return captured.example[node.name]
    value = value_of(node)
    return torch.zeros(value.shape, dtype=value.dtype)
