"""Graphs that Dynamo hands to the backend: marked regions, dead code, autocast, parameters, and what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spelled_models import TwoSpellings
from torch import nn
from torch.utils.checkpoint import checkpoint

from subquad.backend import canonical_graph, mark_parameters, rewrite_dynamo_graph
from subquad.ir.report import Report

X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))


def compiled(model: Any, *inputs: Any, training: bool = False) -> tuple[Any, list[Report]]:
    """The outputs of a model compiled by the backend without an inner one, and the reports of its graphs."""
    reports: list[Report] = []

    def backend(graph: torch.fx.GraphModule, given: Any) -> Any:
        rewritten, report = rewrite_dynamo_graph(graph, given, None)
        reports.append(report)
        return rewritten

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        return torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(*inputs), reports


class Checkpointed(TwoSpellings):
    """Attention inside a checkpointed region, beside an autocast that is off."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            y = checkpoint(super().forward, x, use_reentrant=False)
        return y + x


def test_a_checkpointed_region_is_read_in_inference_and_kept_in_training() -> None:
    model = Checkpointed()
    got, (report,) = compiled(model, X)
    assert len(report.sites) == 2
    torch.testing.assert_close(got, model(X))
    got, (report,) = compiled(model, X, training=True)
    assert report.sites == []
    assert any("checkpoint" in refusal.reason for refusal in report.refusals)
    torch.testing.assert_close(got, model(X))
    got.sum().backward()
    assert model.first.weight.grad is not None


def test_autocast_regions_are_written_out_in_inference_and_autocast_around_a_graph_is_refused() -> None:
    class Mixed(TwoSpellings):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    model = Mixed()
    got, (report,) = compiled(model, X)
    assert len(report.sites) == 2
    assert report.refusals == []
    exact = TwoSpellings.forward(copy.deepcopy(model).double(), X.double())
    allowed = 2 * (model(X) - exact).norm() + 2**-8 * exact.abs().max()
    assert (got - exact).norm() <= allowed
    got, (report,) = compiled(model, X, training=True)
    assert [r.what for r in report.refusals] == ["graph", "attention", "softmax"]
    assert all("autocast region" in r.reason and "trained" in r.reason for r in report.refusals)
    torch.testing.assert_close(got, model(X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, (report,) = compiled(TwoSpellings(), X)
    assert not report.sites
    assert "under autocast" in report.refusals[0].reason


def test_a_write_that_cannot_be_a_value_is_refused_and_runs_as_it_did() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        y = x.clone().transpose_(1, 2)
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]) + y.sum()

    got, (report,) = compiled(attend, X)
    whole, call = report.refusals
    assert "`transpose_` changes the shape" in whole.reason
    assert (call.what, whole.reason in call.reason) == ("attention", True)
    assert re.search(r"test_backend_graphs\.py:\d+$", call.source)
    torch.testing.assert_close(got, attend(X))


class Router(nn.Module):
    """One expert's share per token, from a gate that every forward converts to float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(32, 4, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gate = self.gate.to(torch.float32)
        exponentials = self.gate(x).exp()
        return F.softmax(self.gate(x), -1) + exponentials / exponentials.sum(-1, keepdim=True)


def test_a_router_that_converts_its_gate_is_accounted_for() -> None:
    got, (report,) = compiled(Router(torch.float32), X)
    assert [(r.what, "a router" in r.reason) for r in report.refusals] == [("softmax", True)] * 2
    torch.testing.assert_close(got, Router(torch.float32)(X))


def test_a_tensor_that_is_set_to_another_is_no_value() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.set_(y).set_(x * 2)
        exponentials = (y @ x.transpose(1, 2) * 0.1).exp()
        return exponentials / exponentials.sum(-1, keepdim=True) @ x

    got, (report,) = compiled(attend, X)
    assert [r.what for r in report.refusals] == ["graph", "softmax"]
    assert all("`set_` gives a tensor other memory" in r.reason for r in report.refusals)
    torch.testing.assert_close(got, attend(X))


def test_parameters_are_marked_and_dead_code_is_gone() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.register_buffer("seen", torch.ones(7, 7, dtype=torch.bool).tril())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, attn_mask=~self.seen)[0]

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(canonical_graph(graph))
        mark_parameters([n for n in graphs[-1].graph.nodes if n.op == "placeholder"])
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Wasteful().eval(), backend=backend)(X)
    marked = {n.name: n.meta["parameter"] for n in graphs[0].graph.nodes if n.op == "placeholder"}
    assert sum(marked.values()) == 4
    assert not any(marked[name] for name in marked if "seen" in name or name == "l_x_")
    assert not any("mean" in str(n.target) for n in graphs[0].graph.nodes)


def test_a_branch_of_the_graph_is_reported() -> None:
    def either(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.softmax(-1) @ x, lambda x: x * 2, (x,))

    square = torch.randn(4, 4)
    got, (report,) = compiled(either, square)
    assert any("`cond`" in refusal.reason for refusal in report.refusals)
    torch.testing.assert_close(got, either(square))


@pytest.mark.parametrize("shape", [(2, 7, 32), (3, 9, 32)])
def test_a_compiled_region_is_read_through(shape: tuple[int, ...]) -> None:
    region = torch.compiler.nested_compile_region(lambda model, x: model(x))

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TwoSpellings()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return region(self.inner, x) * 2

    model, x = Nested().eval(), torch.randn(shape)
    got, (report,) = compiled(model, x)
    assert len(report.sites) == 2
    torch.testing.assert_close(got, model(x))


class Forwarding(nn.Module):
    """Layers of a module that looks attributes up itself, as diffusers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(TwoSpellings() for _ in range(2))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x))


def test_paths_of_a_module_that_looks_attributes_up_itself() -> None:
    _, (report,) = compiled(Forwarding(), X)
    assert [site.path for site in report.sites] == ["blocks.0", "blocks.0#1", "blocks.1", "blocks.1#1"]
