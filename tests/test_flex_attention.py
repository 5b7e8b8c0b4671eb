"""FlexAttention's operator is written out, recognised and rewritten, in both dialects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import subquad
from subquad.backend import rewrite_dynamo_graph
from subquad.ir.report import Report
from subquad.pass_spec import parse_passes
from subquad.passes.canonicalize.flex_attention import flex_written_out, is_flex

T = 12
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class Biased(nn.Module):
    """Softcap, a slope per head and a sliding window, with shared key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.tensor([0.5, 0.25, 0.1, 0.05]))
        self.seen = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 5), None, None, T, T, device="cpu")

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return torch.tanh(s / 30) * 30 + self.slope[h] * (j - i)

        return flex_attention(q, k, v, score_mod=score, block_mask=self.seen, scale=0.3, enable_gqa=True)


class Causal(nn.Module):
    """A causal mask written as a score_mod."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        hidden = -float("inf")
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, hidden), enable_gqa=True)


class Normalised(nn.Module):
    """Reads the log-sum-exp, which the rewritten operator does not give."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, total = flex_attention(q, k, v, return_lse=True, enable_gqa=True)
        return out * total[..., None]


def operands() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 4, T, 16), torch.randn(2, 2, T, 16), torch.randn(2, 2, T, 16)


def through_dynamo(model: nn.Module) -> tuple[torch.Tensor, Report]:
    reports = []

    def backend(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        rewritten, report = rewrite_dynamo_graph(graph, examples, parse_passes(["fuse"]))
        reports.append(report)
        return rewritten.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)(*operands()), reports[0]


@pytest.mark.parametrize(
    ("model", "softcap", "biases"), [(Biased(), 30.0, 1), (Causal(), None, 0)], ids=["biased", "causal"]
)
def test_a_flex_attention_is_a_site_with_a_proved_mask(model: nn.Module, softcap: float | None, biases: int) -> None:
    expected = model(*operands())
    out, report = through_dynamo(model)
    captured = subquad.inspect(model, operands())
    for found in (report, captured):
        assert [(s.heads, s.kv_heads, s.softcap, len(s.biases)) for s in found.sites] == [(4, 2, softcap, biases)]
        assert found.sites[0].mask.predicate is not None
        assert found.sites[0].mask.empty_rows == "zero"
    assert torch.allclose(out, expected, atol=2e-6)
    fast = subquad.rewrite(model, passes=["fuse"], example_inputs=operands())
    assert torch.allclose(fast(*operands()), expected, atol=2e-6)


def test_a_read_log_sum_exp_keeps_the_operator() -> None:
    expected = Normalised()(*operands())
    out, report = through_dynamo(Normalised())
    assert not report.sites
    assert report.refusals
    assert "log-sum-exp" in subquad.inspect(Normalised(), operands()).refusals[0].reason
    assert torch.equal(out, expected)


def test_an_operation_that_is_not_understood_keeps_the_operator() -> None:
    class Waves(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + torch.sin(i - j), enable_gqa=True)

    kept = []

    def backend(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        kept.append(any(is_flex(node) for node in flex_written_out(graph).graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(Waves(), backend=backend)(*operands())
    assert kept == [True]
