"""Python numbers that Dynamo makes symbolic: they are read where attention needs them, and a changed one compiles again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spelled_models import tiny_llama
from torch import nn

from subquad import backend
from subquad.backend import rewrite_dynamo_graph
from subquad.ir.report import Report
from subquad.pass_spec import parse_passes

X = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))


def compiled(model: Any, reports: list[Report]) -> Any:
    """The model under `torch.compile(dynamic=True)` with `fuse` applied; every graph adds its report."""

    def inner(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        rewritten, report = rewrite_dynamo_graph(graph, inputs, parse_passes("fuse"))
        reports.append(report)
        return rewritten.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=inner, dynamic=True, fullgraph=True)


@pytest.mark.parametrize("spelling", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
def test_a_changed_scale_of_a_language_model_compiles_again(spelling: str) -> None:
    model, reports = tiny_llama(2, spelling).eval(), []
    fast = compiled(model, reports)

    def agree(rows: int, length: int) -> None:
        ids = torch.arange(rows * length).reshape(rows, length) % 50
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        inputs["attention_mask"][0, :3] = 0
        seen = inputs["attention_mask"].bool()
        torch.testing.assert_close(fast(**inputs).logits[seen], model(**inputs).logits[seen])

    with torch.no_grad():
        agree(2, 9)
        (first,) = reports
        assert [site.scale for site in first.sites] == pytest.approx([8**-0.5] * 2)
        assert len(first.applied) == 2
        agree(3, 13)
        assert len(reports) == 1
        for layer in model.model.layers:
            layer.self_attn.scaling *= 3
        agree(2, 9)
        assert len(reports) == 2
        assert [site.scale for site in reports[1].sites] == pytest.approx([3 * 8**-0.5] * 2)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (3, 8)).transpose(1, 2)


class Settings(nn.Module):
    """SDPA with a scale and a dropout that are attributes."""

    def __init__(self, scale: float = 0.4, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = heads(x)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout, scale=self.scale * 0.5)


def test_computed_scales_are_read_and_dropout_is_refused() -> None:
    model, reports = Settings(), []
    fast = compiled(model, reports)
    torch.testing.assert_close(fast(X), model(X))
    assert [site.scale for site in reports[0].sites] == [0.2]
    assert reports[0].applied
    model.scale = 0.9
    torch.testing.assert_close(fast(X), model(X))
    assert [site.scale for site in reports[1].sites] == [0.45]
    reports.clear()
    compiled(Settings(dropout=0.7), reports)(X)
    assert not reports[0].sites
    assert "dropout" in reports[0].refusals[0].reason


def test_a_scale_that_depends_on_the_length_stays_in_the_graph() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        q = heads(x)
        return F.scaled_dot_product_attention(q, q, q, scale=x.shape[1] / 8)

    torch._dynamo.reset()
    fast = torch.compile(attend, backend="subquad", dynamic=True, options={"passes": ["fuse"], "inner": "eager"})
    for length in (7, 5, 6):
        torch.testing.assert_close(fast(X[:, :length]), attend(X[:, :length]))
    assert not backend.reports[-1].applied
