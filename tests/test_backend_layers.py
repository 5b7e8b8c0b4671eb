"""Attention that Dynamo keeps as one operation, and what torch.vmap maps: the sites are those that export shows."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo_dialects import differences, site_words

import subquad
from subquad import backend
from subquad.backend import compile_graph, rewrite_dynamo_graph
from subquad.ir.errors import PassError
from subquad.ir.report import Report
from subquad.pass_spec import parse_passes
from subquad.passes.canonicalize import torch_layers

X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
LONGER = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))


def padding(x: torch.Tensor) -> torch.Tensor:
    """The last keys of the first row are hidden."""
    hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
    hidden[0, x.shape[1] - 2 :] = True
    return hidden


def triangle(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of an input with itself."""

    def __init__(
        self, call: Callable[[torch.Tensor], dict[str, Any]] = lambda x: {}, drop: bool = False, **settings: Any
    ) -> None:
        super().__init__()
        self.drop = drop
        self.attention = nn.MultiheadAttention(32, 4, **{"batch_first": True} | settings)
        self.call = call

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> Any:
        call = {"need_weights": False} | self.call(x)
        if call.pop("padded", False):
            call["key_padding_mask"] = hidden
        out, weights = self.attention(x, x, x, **call)
        return (out, weights) if call["need_weights"] and not self.drop else out


class Encoder(nn.Module):
    def __init__(self, masked: bool = False, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **settings)
        self.encoder, self.masked = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), masked

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, mask=triangle(x) if self.masked else None, src_key_padding_mask=hidden)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(x, x * 0.5, tgt_mask=triangle(x), memory_key_padding_mask=hidden, tgt_is_causal=True)


class Mapped(nn.Module):
    """Attention of one head of one sequence, mapped over both; its mask is a mapped function of indices."""

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        def seen(hidden: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return (i >= j) & ~hidden

        def one(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.softmax((x @ x.T * 0.3).masked_fill(~mask, -torch.inf), -1) @ x

        steps = torch.arange(x.shape[1])
        each_key = torch.vmap(seen, (0, None, 0))
        masks = torch.vmap(torch.vmap(each_key, (None, 0, None)), (0, None, None))(hidden, steps, steps)
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return torch.vmap(torch.vmap(one, (0, None)))(heads, masks).sum(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "weights are read": lambda: SelfAttention(lambda x: {"need_weights": True}),
    "weights are read, per head": lambda: SelfAttention(
        lambda x: {"need_weights": True, "average_attn_weights": False}
    ),
    "no weights": SelfAttention,
    "weights that nobody reads": lambda: SelfAttention(lambda x: {"need_weights": True}, drop=True),
    "time first": lambda: SelfAttention(batch_first=False),
    "padding": lambda: SelfAttention(lambda x: {"padded": True}),
    "mask": lambda: SelfAttention(lambda x: {"attn_mask": triangle(x)}),
    "mask and padding": lambda: SelfAttention(lambda x: {"attn_mask": triangle(x), "padded": True}),
    "hint": lambda: SelfAttention(lambda x: {"attn_mask": triangle(x), "is_causal": True}),
    "further keys": lambda: SelfAttention(add_bias_kv=True),
    "zero keys": lambda: SelfAttention(lambda x: {"padded": True}, add_zero_attn=True),
    "encoder": Encoder,
    "encoder, norms first": lambda: Encoder(norm_first=True, activation="gelu"),
    "encoder, masked": lambda: Encoder(masked=True),
    "decoder": Decoder,
    "vmap": Mapped,
}
SYMBOLIC = {"padding", "zero keys"}
"""Compiled with symbolic sizes."""


def through_dynamo(
    model: nn.Module, dynamic: bool | None, *calls: tuple[torch.Tensor, ...]
) -> tuple[Report, list[Any]]:
    """The report of the first graph, and the outputs of each call with `fuse` applied."""
    reports: list[Report] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        rewritten, report = rewrite_dynamo_graph(graph, inputs, parse_passes("fuse"))
        reports.append(report)
        return rewritten.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        outputs = [compiled(*call) for call in calls]
    return reports[0], outputs


def words(report: Report) -> list[dict[str, Any]]:
    """What both captures of each site have to agree on, sizes under one name."""
    return [site_words(site) | {"mask": re.sub(r"\bs\d+\b", "s", site_words(site)["mask"])} for site in report.sites]


@pytest.mark.parametrize("name", MODELS)
def test_sites_and_refusals_are_those_of_export_and_the_outputs_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    calls = [(X, padding(X)), (LONGER, padding(LONGER))]
    report, outputs = through_dynamo(model, name in SYMBOLIC or None, *calls)
    with torch.no_grad():
        exported = subquad.inspect(model, calls[0])
        assert differences(words(exported), words(report)) == []
        assert [site.path for site in exported.sites] == [site.path for site in report.sites]
        assert [r.reason for r in exported.refusals] == [r.reason for r in report.refusals]
        assert len(report.applied) == len(report.sites)
        assert bool(report.sites) != ("weights are read" in name)
        for got, call in zip(outputs, calls, strict=True):
            torch.testing.assert_close(got, model(*call), rtol=1e-5, atol=1e-5)


def test_an_encoder_whose_rows_are_hidden_as_a_whole_keeps_its_values() -> None:
    torch.manual_seed(0)
    model, hidden = Encoder().eval(), padding(X)
    hidden[0] = True
    _, (got,) = through_dynamo(model, None, (X, hidden))
    with torch.no_grad():
        torch.testing.assert_close(got, model(X, hidden), equal_nan=True)


def test_training_through_a_layer_that_is_written_out() -> None:
    torch.manual_seed(0)
    model = SelfAttention(lambda x: {"attn_mask": triangle(x)}).eval()

    def gradients(forward: Any) -> list[torch.Tensor]:
        model.zero_grad()
        forward(X, padding(X)).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="subquad", options={"passes": ["fuse"], "inner": "aot_eager"})
    torch.testing.assert_close(gradients(compiled), gradients(model), rtol=1e-4, atol=1e-5)
    assert backend.reports[-1].applied


def test_a_layer_that_cannot_be_written_out_is_refused_by_name() -> None:
    broken = {F.multi_head_attention_forward: mock.Mock(side_effect=ValueError("on purpose"))}
    model = SelfAttention().eval()
    with mock.patch.dict(torch_layers.WRITTEN_OUT, broken):
        report, (got,) = through_dynamo(model, None, (X, padding(X)))
    (refusal,) = report.refusals
    assert "`multi_head_attention_forward` could not be written out: on purpose" in refusal.reason
    assert (refusal.path, refusal.what) == ("attention", "attention")
    torch.testing.assert_close(got, model(X, padding(X)))


def test_other_transforms_of_functions_are_refused() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        y = torch.func.grad(lambda x: x.square().sum())(x)
        return F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])

    report, (got,) = through_dynamo(attend, None, (X,))  # type: ignore[arg-type]
    assert "is a transform of torch.func" in report.refusals[0].reason
    torch.testing.assert_close(got, attend(X))


def test_an_error_of_our_own_leaves_the_graph_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = SelfAttention().eval()
    for broken in ("recognise", "canonical_graph", "emit_site"):
        torch._dynamo.reset()
        with torch.no_grad(), mock.patch.object(backend, broken, side_effect=IndexError("on purpose")):
            compiled = torch.compile(model, backend="subquad", options={"passes": ["fuse"], "inner": "eager"})
            with caplog.at_level(logging.ERROR, "subquad.backend"):
                torch.testing.assert_close(compiled(X, padding(X)), model(X, padding(X)))
        refusals = backend.reports[-1].refusals
        assert [refusal.what for refusal in refusals] == ["graph", "attention"]
        assert all("IndexError: on purpose" in refusal.reason for refusal in refusals)
        assert not backend.reports[-1].applied
        assert "IndexError" in caplog.text
        caplog.clear()


def test_an_inner_backend_that_fails_on_the_rewritten_graph_gets_the_original(caplog: pytest.LogCaptureFixture) -> None:
    def inner(graph: torch.fx.GraphModule, _: Any) -> Any:
        if any("subquad" in str(node.target) for node in graph.graph.nodes):
            raise RuntimeError("no such operator")
        return graph.forward

    model = SelfAttention().eval()
    torch._dynamo.reset()
    with torch.no_grad(), caplog.at_level(logging.CRITICAL, "subquad.backend"):
        options = {"passes": ["fuse"], "inner": inner}
        torch.testing.assert_close(
            torch.compile(model, backend="subquad", options=options)(X, padding(X)), model(X, padding(X))
        )
    assert "no such operator" in backend.reports[-1].rolled_back[0].reason
    assert not backend.reports[-1].applied


def test_bad_options_are_errors() -> None:
    graph = torch.fx.symbolic_trace(nn.Identity())
    for options in ({"pases": ["fuse"]}, {"passes": ["no such pass"]}):
        with pytest.raises(PassError):
            compile_graph(graph, [X], options)
