"""Captured graphs are functional: what a forward writes is seen by what reads it, and nothing that it wrote is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subquad
from subquad.backend import rewrite_dynamo_graph
from subquad.capture import capture
from subquad.functional_graph import first_writer
from subquad.ir.errors import CaptureError
from subquad.passes.canonicalize.functional import functional
from subquad.passes.canonicalize.mutation import write_of

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
LONGER = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(1))


class Scored(nn.Module):
    """Attention whose scores are changed by a function that writes."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.change = nn.Linear(16, 48), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.softmax(self.change(q @ k.transpose(-1, -2) * 0.25), -1) @ v


def _square(scores: torch.Tensor) -> torch.Tensor:
    return torch.zeros(scores.shape[-1], scores.shape[-1])


def bias_written_through_views(scores: torch.Tensor) -> torch.Tensor:
    m = _square(scores)
    m[1, :2] = -100
    m[2:, 0] = -3.0
    return scores + m


def mask_as_a_statement(scores: torch.Tensor) -> torch.Tensor:
    scores.masked_fill_(torch.ones(scores.shape[-1], scores.shape[-1]).triu(1).bool(), float("-inf"))
    return scores


def best_renormalised(scores: torch.Tensor) -> torch.Tensor:
    best, places = torch.topk(scores, 2, -1)
    best /= best.sum(-1, keepdim=True)
    return scores + best[..., :1] + places[..., :1]


def augmented(scores: torch.Tensor) -> torch.Tensor:
    view = scores[:, :, 1:]
    scores -= 1.0
    view *= 2
    return scores + view.sum()


def indexed(scores: torch.Tensor) -> torch.Tensor:
    scores[:, 0, torch.arange(3), 1] = -5.0
    m = _square(scores)
    m.index_put_((torch.tensor([0, 2]), torch.tensor([1, 1])), torch.tensor(-7.0))
    return scores + m


def by_mask(scores: torch.Tensor) -> torch.Tensor:
    m = _square(scores)
    m[torch.ones_like(m).triu(2).bool()] = -50.0
    return scores + m


def transposed_view(scores: torch.Tensor) -> torch.Tensor:
    scores.transpose(-1, -2)[..., 0, :].add_(3.0)
    scores.mT[..., 1, :] = 0.5
    return scores


def parts(scores: torch.Tensor) -> torch.Tensor:
    first, second, *_ = scores.unbind(-1)
    second.mul_(first)
    left, right = torch.zeros(4, 6).split(3, dim=1)
    joined = torch.stack([left, right])
    right.fill_(2.0)
    return scores + joined.sum() + right.sum()


def flat_view(scores: torch.Tensor) -> torch.Tensor:
    flat = scores.view(scores.shape[0], -1)
    flat[:, 3] = -9.0
    scores.squeeze(1).unsqueeze(0).diagonal(dim1=-2, dim2=-1).zero_()
    return scores


def copied(scores: torch.Tensor) -> torch.Tensor:
    m = torch.empty_like(scores)
    m.copy_(scores[:1].detach() * 0.5)
    m[:, :, 0] = m[:, :, 1].clone()[None]
    return m.contiguous().permute(0, 1, 2, 3)


def functions(scores: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(scores)
    torch.mul(scores, 0.5, out=out)
    F.relu(out, inplace=True)
    torch.relu_(scores)
    scores.clamp_(max=1.0)
    return scores + out


def narrower(scores: torch.Tensor) -> torch.Tensor:
    half = scores.half()
    half.add_(scores.double()).div_(3)
    return scores + half


WRITES = [bias_written_through_views, mask_as_a_statement, augmented, indexed, by_mask, transposed_view, parts, flat_view,
          copied, functions, narrower, best_renormalised]  # fmt: skip


def _written(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in module.graph.nodes if write_of(n) is not None and n.target is not torch.ops.aten.copy_.default]


def _dynamo(model: nn.Module, *inputs: Any, check: Callable[[torch.fx.GraphModule], Any] | None = None) -> Any:
    """Run a model with every Dynamo graph made functional, then interpreted in an order of its own."""

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        made = functional(graph)
        assert not _written(made)
        if check is not None:
            check(made)
        return _on_demand(made)

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(*inputs)


def _on_demand(module: torch.fx.GraphModule) -> Callable[..., Any]:
    """The outputs of a graph computed from what they depend on, as recognition reads it: a write by the side would be lost."""

    def run(*inputs: Any) -> Any:
        given = iter(inputs)
        known = {n: next(given) for n in module.graph.nodes if n.op == "placeholder"}

        def value(node: torch.fx.Node) -> Any:
            if node not in known:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
                call = getattr(args[0], node.target) if node.op == "call_method" else node.target
                known[node] = call(*(args[1:] if node.op == "call_method" else args), **kwargs)
            return known[node]

        result = torch.fx.map_arg(module.graph.output_node().args[0], value)
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.copy_.default:
                value(node)
        return result

    return run


@pytest.mark.parametrize("change", WRITES, ids=lambda f: f.__name__)
def test_exported_graphs_hold_no_write_and_compute_the_same(change: Any) -> None:
    model = Scored(change).eval()
    captured = capture(model, (X,))
    assert first_writer(captured.graph) is None
    for x in (X, LONGER):
        with torch.no_grad():
            torch.testing.assert_close(captured.graph(x)[0], model(x))


@pytest.mark.parametrize("change", WRITES, ids=lambda f: f.__name__)
def test_dynamo_graphs_hold_no_write_and_compute_the_same(change: Any) -> None:
    model = Scored(change).eval()
    for x in (X, LONGER):
        with torch.no_grad():
            torch.testing.assert_close(_dynamo(model, x), model(x))


def test_the_bias_that_was_written_reaches_the_rewritten_model() -> None:
    model = Scored(bias_written_through_views).eval()
    with torch.no_grad():
        expected = model(LONGER)
        fast = subquad.rewrite(model, passes=["fuse"], example_inputs=(X,))
        torch.testing.assert_close(fast(LONGER), expected)


def test_a_judge_that_lost_a_write_breaks_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.lifting.functional", lambda module: module)
    model = Scored(bias_written_through_views).eval()
    with torch.no_grad():
        expected = model(X)
        fast = subquad.rewrite(model, passes=["fuse"], example_inputs=(X,))
        assert [refusal.what for refusal in fast.report.rolled_back] == ["verification"]
        assert any("captured graph" in refusal.reason for refusal in fast.report.rolled_back)
        torch.testing.assert_close(fast(X), expected)


def test_verification_leaves_buffers_as_they_were() -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    fast = subquad.rewrite(model, passes=["fuse"], example_inputs=(X.clone(),))
    assert fast.report.verification
    before = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    subquad.verify(fast)
    torch.testing.assert_close(fast.state_dict(), before)


class Counting(nn.Module):
    """A running buffer, a cache written by position, and an input that is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(4, 7, 16))
        self.attention = Scored(bias_written_through_views)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.cache[: x.shape[0], 1:3] = x[:, :2]
        y = self.attention(x)
        x[:, 0] = 0.0
        return y + self.cache[: x.shape[0], :1].unsqueeze(1) * self.calls


def test_buffers_and_inputs_are_written_by_the_captured_graph() -> None:
    torch.manual_seed(0)
    model, other = Counting().eval(), Counting().eval()
    other.load_state_dict(model.state_dict())
    captured = capture(model, (X.clone(),))
    assert model.calls == 0
    with torch.no_grad():
        for _ in range(2):
            given, expected_given = X.clone(), X.clone()
            torch.testing.assert_close(captured.graph(given)[0], other(expected_given))
            torch.testing.assert_close(given, expected_given)
    assert model.calls == 2
    torch.testing.assert_close(model.cache, other.cache)


def test_buffers_and_inputs_are_written_behind_torch_compile() -> None:
    torch.manual_seed(0)
    model, other = Counting().eval(), Counting().eval()
    other.load_state_dict(model.state_dict())
    for _ in range(2):
        given, expected_given = X.clone(), X.clone()
        got = _dynamo(model, given)
        with torch.no_grad():
            torch.testing.assert_close(got, other(expected_given))
        torch.testing.assert_close(given, expected_given)
    torch.testing.assert_close(model.cache, other.cache)
    assert model.calls == 2


def test_a_saved_program_that_writes_is_captured_before_and_after_decomposition(tmp_path: Any) -> None:
    with torch.no_grad():
        program = torch.export.export(Counting().eval(), (X.clone(),), strict=False)
    for n, one in enumerate((program, program.run_decompositions({}), program.run_decompositions())):
        torch.export.save(one, tmp_path / f"{n}.pt2")
        loaded = torch.export.load(tmp_path / f"{n}.pt2")
        captured, reference = capture(loaded), Counting().eval()
        reference.load_state_dict(program.state_dict)
        assert {n.target for n in captured.graph.graph.nodes if write_of(n)} == {torch.ops.aten.copy_.default}
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(captured.graph(X.clone())[0], reference(X.clone()))
        torch.testing.assert_close(captured.root.cache, reference.cache)


def test_a_traced_graph_is_made_functional_and_keeps_its_leaf_modules() -> None:
    class InPlaceLeaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = x @ x.transpose(1, 2)
            seen = scores.view(-1)
            self.relu(scores)
            scores.sub_(seen.mean())
            return scores.softmax(-1) @ x

    model = InPlaceLeaves().eval()
    captured = capture(torch.fx.symbolic_trace(model), (X,))
    assert not _written(captured.graph) or [n.op for n in _written(captured.graph)] == ["call_module"]
    torch.testing.assert_close(captured.graph(LONGER), model(LONGER))
    torch.testing.assert_close(_on_demand_leaf(captured.graph, LONGER), model(LONGER))


def _on_demand_leaf(module: torch.fx.GraphModule, x: torch.Tensor) -> Any:
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    return torch.fx.GraphModule(module, graph)(x)


def test_a_write_without_a_functional_form_is_refused_with_its_line() -> None:
    def resized(scores: torch.Tensor) -> torch.Tensor:
        return scores + scores.detach().clone().transpose_(2, 3)

    def check(_: Any) -> None:
        raise AssertionError("not refused")

    with pytest.raises(Exception, match=r"`transpose_` changes the shape.*test_capture_mutation\.py:\d+"):
        _dynamo(Scored(resized).eval(), X, check=check)


def test_augmented_arithmetic_on_numbers_is_no_write() -> None:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        assert functional(graph) is graph
        return graph

    def count(x: torch.Tensor) -> torch.Tensor:
        total = x.shape[0]
        total += x.shape[1]
        return x * total

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(count, backend=backend, dynamic=True)(X), X * 9)


def test_the_backend_sees_a_mask_given_as_a_statement() -> None:
    model = Scored(mask_as_a_statement).eval()
    masks: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        rewritten, report = rewrite_dynamo_graph(graph, inputs, None)
        masks.extend(site.mask.family for site in report.sites)
        return rewritten

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, dynamic=True)(X), model(X))
    assert masks == ["causal"]


def test_an_unknown_write_in_an_exported_program_is_refused() -> None:
    with pytest.raises(CaptureError):
        capture(Scored(lambda s: s.resize_(1)).eval(), (X,))
