"""Decoding loops inside graphs: unrolled with the model as a leaf, unrolled by Dynamo, carried by torch.while_loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spelled_models import HandWrittenDecoder
from torch import nn
from torch._higher_order_ops import while_loop

import subquad
from subquad.ir.refusal import Refusal
from subquad.passes.recognize.loop_carried import find_while_loops
from subquad.passes.recognize.loop_unrolled import Unrolled, find_unrolled

LENGTH = 16


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = HandWrittenDecoder(41, 16, 2, LENGTH, 1)


class Plain(Holder):
    def forward(self, ids):
        for _ in range(4):
            row = self.model(ids)[:, -1, :] / 0.8
            best, _ = torch.topk(row, 5)
            row = row.masked_fill(row < best[:, -1:], -torch.inf)
            ids = torch.cat([ids, torch.multinomial(row.softmax(-1), 1)], dim=1)
        return ids


class Scheduled(Holder):
    def forward(self, ids):
        for n in range(4):
            row = self.model(ids)[:, -1] / (0.5 + n)
            ids = torch.cat([ids, row.argmax(-1, keepdim=True)], 1)
        return ids


class Reversed(Holder):
    def forward(self, ids):
        for _ in range(3):
            ids = torch.cat([self.model(ids)[:, -1].argmax(-1, keepdim=True), ids], 1)
        return ids


class Apart(Holder):
    """Two calls on the same ids are no loop."""

    def forward(self, ids):
        return self.model(ids)[:, -1].argmax(-1), self.model(ids + 1)[:, -1].argmax(-1)


class Leaf(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, HandWrittenDecoder)


def by_trace(holder: nn.Module) -> list[Any]:
    return find_unrolled(Leaf().trace(holder))


def by_dynamo(holder: nn.Module) -> list[Any]:
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.extend(find_unrolled(graph.graph))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(holder, backend=backend)(torch.zeros(1, 4, dtype=torch.long))
    return found


@pytest.mark.parametrize("graph", [by_trace, by_dynamo])
def test_an_unrolled_loop_is_rolled_up_again(graph: Any) -> None:
    (found,) = graph(Plain().eval())
    assert isinstance(found, Unrolled)
    loop = found.loop
    assert (loop.origin, loop.context.kind, loop.choice.kind, loop.write.kind) == (
        "unrolled", "full prefix", "multinomial", "cat",
    )  # fmt: skip
    assert [slot.kind for slot in loop.processors][:2] == ["temperature", "top-k"]
    assert loop.bound.detail == "4 calls"
    assert len(found.calls) == 4
    assert loop.select.kind == "last row"


@pytest.mark.parametrize("graph", [by_trace, by_dynamo])
def test_segments_that_differ_are_refused(graph: Any) -> None:
    (found,) = graph(Scheduled().eval())
    assert isinstance(found, Refusal)
    assert found.what == "loop: processors"
    assert "calls 2 and 3" in found.reason
    (turned,) = graph(Reversed().eval())
    assert isinstance(turned, Refusal)
    assert turned.what == "loop: write"
    assert graph(Apart().eval()) == []


class Longer(Holder):
    def forward(self, ids):
        for _ in range(9):
            row = self.model(ids)[:, -1] / 0.8
            ids = torch.cat([ids, torch.multinomial(row.softmax(-1), 1)], dim=1)
        return ids


class WithScores(Holder):
    def forward(self, ids):
        scores = []
        for _ in range(9):
            scores.append(self.model(ids)[:, -1])
            ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], dim=1)
        return ids, torch.stack(scores, 1)


def runs(function: Any, *prompts: torch.Tensor) -> list[Any]:
    found = []
    with torch.no_grad():
        for ids in prompts:
            torch.manual_seed(3)
            found.append((function(ids.clone()), torch.get_rng_state()))
    return found


PROMPTS = (torch.arange(4)[None], torch.arange(4)[None] + 7, torch.arange(4)[None] + 20)


def test_an_unrolled_graph_with_the_model_as_a_leaf_is_answered_and_restored() -> None:
    holder = Longer().eval()
    graph = torch.fx.GraphModule(holder, Leaf().trace(holder))
    want = runs(holder, *PROMPTS)
    fast = subquad.rewrite(graph)
    for (ids, state), (tokens, after) in zip(want, runs(fast, *PROMPTS), strict=True):
        assert torch.equal(ids, tokens)
        assert torch.equal(state, after)
    assert "23 calls of the model were answered by the decoder, 4 by itself" in fast.report.notes
    assert fast.report.applied[0]["contract"] == "lossless"
    assert subquad.restore(fast) is graph
    assert torch.equal(runs(graph, PROMPTS[0])[0][0], want[0][0])
    assert "forward" not in graph.__dict__


@pytest.mark.parametrize("kind", [Longer, Plain])
def test_the_backend_rolls_an_unrolled_loop_up_again(kind: Any) -> None:
    from subquad.backend import reports

    holder = kind().eval()
    want = runs(holder, *PROMPTS)
    torch._dynamo.reset()
    found = runs(torch.compile(holder, backend="subquad"), *PROMPTS)
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(want, found, strict=True))
    report = reports[-1]
    assert [loop.origin for loop in report.loops] == ["unrolled"]
    assert not report.refusals
    assert any("answered by the decoder" in note for note in report.notes)
    with torch.no_grad():
        holder.model.head.weight.normal_()
    changed = runs(holder, PROMPTS[0])[0][0]
    assert torch.equal(runs(torch.compile(holder, backend="subquad"), PROMPTS[0])[0][0], changed)


def test_a_loop_whose_logits_leave_it_is_compiled_as_it_is() -> None:
    from subquad.backend import reports

    torch._dynamo.reset()
    holder = WithScores().eval()
    found = torch.compile(holder, backend="subquad", options={"inner": "eager"})(PROMPTS[0])
    torch.testing.assert_close(found[1], holder(PROMPTS[0])[1])
    assert [loop.origin for loop in reports[-1].loops] == ["unrolled"]
    assert not any("answered" in note for note in reports[-1].notes)


class Exported(Holder):
    """A greedy loop over a buffer; `step`, `place` and `row` are what the counter-examples change."""

    def __init__(self, step: int = 1, place: int = 0, stops: bool = False, row: int = 1) -> None:
        super().__init__()
        self.step, self.place, self.stops, self.row = step, place, stops, row

    def forward(self, buffer, at, end, done):
        def going(buffer, at, end, done):
            return ((at < end) & ~done).all() if self.stops else (at < end).all()

        def once(buffer, at, end, done):
            row = torch.index_select(self.model(buffer), 1, at - self.row).squeeze(1)
            token = (row / 0.7).argmax(-1)
            buffer = buffer.index_copy(1, at * 0 + 3 if self.place else at, token.unsqueeze(1))
            return buffer, at + self.step, end.clone(), (token == 5) if self.stops else done.clone()

        return while_loop(going, once, (buffer, at, end, done))


def exported(holder: nn.Module) -> torch.export.ExportedProgram:
    inputs = (torch.zeros(1, LENGTH, dtype=torch.long), torch.tensor([3]), torch.tensor([9]), torch.tensor([False]))
    return torch.export.export(holder.eval(), inputs, strict=False)


def test_a_while_loop_is_read() -> None:
    (loop,) = find_while_loops(exported(Exported(stops=True)).graph_module)
    assert not isinstance(loop, Refusal)
    assert (loop.origin, loop.context.kind, loop.choice.kind, loop.write.kind) == (
        "while_loop", "full prefix", "argmax", "slot write",
    )  # fmt: skip
    assert [slot.kind for slot in loop.processors] == ["temperature"]
    assert [slot.kind for slot in loop.stop] == ["rows that ended"]
    report = subquad.inspect(exported(Exported()))
    assert [found.origin for found in report.loops] == ["while_loop"]
    assert report.loops[0].stop == ()


@pytest.mark.parametrize(
    ("holder", "slot"), [(Exported(step=2), "positions"), (Exported(place=1), "write"), (Exported(row=2), "select")]
)
def test_a_while_loop_with_a_catch_is_refused(holder: nn.Module, slot: str) -> None:
    (found,) = find_while_loops(exported(holder).graph_module)
    assert isinstance(found, Refusal)
    assert found.what == f"loop: {slot}"
