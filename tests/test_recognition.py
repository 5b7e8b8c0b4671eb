"""Recognition: every spelling becomes one site with its parts and mask proved; what is no attention is refused with a reason."""

from __future__ import annotations

import math

import pytest
import torch
from spelled_models import (
    HandWrittenDecoder,
    LinearAttention,
    Pooling,
    Router,
    ScoredAttention,
    TwoSpellings,
    tiny_llama,
)
from torch import nn

import subquad

X = (torch.randn(2, 9, 32),)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_llama_sites_are_found_with_grouped_heads_and_a_proved_mask(implementation: str) -> None:
    report = subquad.inspect(tiny_llama(3, implementation))
    assert [site.path for site in report.sites] == [f"model.layers.{n}.self_attn" for n in range(3)]
    assert not report.refusals
    for site in report.sites:
        assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (6, 2, 8, 8)
        assert site.mask.family == "causal & padding(attention_mask)"
        assert site.scale == pytest.approx(8**-0.5)
        assert site.mask.empty_rows == ("zero" if implementation == "sdpa" else "mean")
        assert "modeling_llama.py" in site.source
        assert any("6 concrete cases" in sentence for sentence in site.mask.evidence)


def test_llama_without_a_padding_mask_reduces_its_packed_sequence_logic_to_causal() -> None:
    ids = torch.randint(0, 64, (2, 9))
    report = subquad.inspect(tiny_llama(1), {"input_ids": ids, "use_cache": False})
    assert [site.mask.family for site in report.sites] == ["causal"]


def test_mistral_window_is_proved() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, sliding_window=5,
    )  # fmt: skip
    site = subquad.inspect(MistralForCausalLM._from_config(config, attn_implementation="sdpa").eval()).sites[0]
    assert site.mask.family == "causal & window(5) & padding(attention_mask)"


def test_hand_written_decoder_proves_its_own_causal_buffer() -> None:
    report = subquad.inspect(HandWrittenDecoder().eval(), (torch.randint(0, 50, (2, 9)),))
    assert [site.path for site in report.sites] == ["blocks.0.attn", "blocks.1.attn"]
    assert {site.mask.family for site in report.sites} == {"causal"}
    assert {site.mask.empty_rows for site in report.sites} == {"nan"}


def test_a_buffer_that_is_almost_causal_is_not_called_causal() -> None:
    model = HandWrittenDecoder().eval()
    model.blocks[0].attn.seen[0, 0, 5, 9] = 1.0
    report = subquad.inspect(model, (torch.randint(0, 50, (2, 9)),))
    assert [site.mask.family for site in report.sites] == ["opaque", "causal"]


def test_two_spellings_in_one_forward_get_two_paths() -> None:
    report = subquad.inspect(TwoSpellings().eval(), X)
    assert [(site.path, site.origin, site.mask.family) for site in report.sites] == [
        ("", "sdpa", "causal"),
        ("#1", "softmax", "full"),
    ]
    assert report.sites[1].scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Router(), "a router, pooling"),
        (Pooling(), "pooling or classifier"),
        (LinearAttention(), "not of a product of queries and keys"),
    ],
    ids=["router", "pooling", "linear attention"],
)
def test_what_is_no_attention_is_refused_with_a_reason_and_a_line(model: nn.Module, words: str) -> None:
    report = subquad.inspect(model.eval(), X)
    assert not report.sites
    assert report.refusals
    assert all(words in refusal.reason for refusal in report.refusals)
    assert all("spelled_models.py" in refusal.source for refusal in report.refusals)


def test_returned_probabilities_are_refused() -> None:
    class Returning(nn.Module):
        def forward(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            p = torch.softmax(q @ q.transpose(-1, -2), -1)
            return p @ q, p

    report = subquad.inspect(Returning(), (torch.randn(2, 2, 5, 4),))
    assert not report.sites
    assert "other uses" in report.refusals[0].reason


CAUSAL = torch.ones(64, 64).tril().bool()


def _index(n: int) -> torch.Tensor:
    return torch.arange(n)


SCORE_CHANGES = {
    "full": (lambda s: s, "full"),
    "tril in the forward": (
        lambda s: s.masked_fill(torch.ones(s.shape[-2], s.shape[-1]).tril() == 0, float("-inf")), "causal",
    ),
    "triu of ones, bool": (
        lambda s: s.masked_fill(torch.ones(s.shape[-2], s.shape[-1], dtype=torch.bool).triu(1), -torch.inf), "causal",
    ),
    "arange comparison": (
        lambda s: s.masked_fill(_index(s.shape[-1])[None, :] > _index(s.shape[-2])[:, None], float("-inf")), "causal",
    ),
    "window of 3 by where": (
        lambda s: torch.where(
            (_index(s.shape[-2])[:, None] - _index(s.shape[-1])[None, :] < 3)
            & (_index(s.shape[-2])[:, None] >= _index(s.shape[-1])[None, :]), s, torch.finfo(s.dtype).min,
        ), "causal & window(3)",
    ),
    "chunks of 4": (
        lambda s: torch.where((_index(s.shape[-2]) // 4)[:, None] == (_index(s.shape[-1]) // 4)[None, :], s, float("-inf")),
        "chunk(4)",
    ),
    "additive -inf triangle": (
        lambda s: s + torch.full((s.shape[-2], s.shape[-1]), float("-inf")).triu(1), "causal",
    ),
    "one minus mask times minimum": (
        lambda s: s + (1.0 - torch.ones(s.shape[-2], s.shape[-1]).tril()) * torch.finfo(torch.float32).min, "causal",
    ),
    "prefix of 3": (
        lambda s: torch.where(
            (_index(s.shape[-1])[None, :] <= _index(s.shape[-2])[:, None]) | (_index(s.shape[-1])[None, :] < 3), s, float("-inf"),
        ), "prefix(3)",
    ),
    "anti-causal": (
        lambda s: torch.where(_index(s.shape[-1])[None, :] >= _index(s.shape[-2])[:, None], s, float("-inf")), "window(1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORE_CHANGES)
def test_masks_written_in_the_forward_are_proved_and_fuse_exactly(name: str) -> None:
    change, family = SCORE_CHANGES[name]
    model = ScoredAttention(change).eval()
    inputs = (torch.randn(2, 9, 16),)
    report = subquad.inspect(model, inputs)
    assert [site.mask.family for site in report.sites] == [family]
    wanted = {n: model(torch.randn(1, n, 16, generator=torch.Generator().manual_seed(n))) for n in (2, 9, 23)}
    fast = subquad.rewrite(model, example_inputs=inputs)
    assert len(fast.report.applied) == 1
    assert not fast.report.rolled_back
    for n, want in wanted.items():
        got = fast(torch.randn(1, n, 16, generator=torch.Generator().manual_seed(n)))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_soft_masks_stay_additive() -> None:
    soft = ScoredAttention(lambda s: s + (1.0 - torch.ones(s.shape[-2], s.shape[-1]).tril()) * -10000.0).eval()
    site = subquad.inspect(soft, (torch.randn(2, 9, 16),)).sites[0]
    assert site.mask.family == "full"
    assert len(site.biases) == 1


def test_softcap_and_scales_multiply_out() -> None:
    capped = ScoredAttention(lambda s: torch.tanh(s * 2 / 30.0) * 30.0).eval()
    site = subquad.inspect(capped, (torch.randn(2, 9, 16),)).sites[0]
    assert site.scale == pytest.approx(0.5)
    assert site.softcap == pytest.approx(30.0)
    want = capped(torch.ones(1, 5, 16))
    torch.testing.assert_close(
        subquad.rewrite(capped, example_inputs=(torch.randn(2, 9, 16),))(torch.ones(1, 5, 16)), want
    )


class ScaledOperands(nn.Module):
    """q, k and v multiplied or divided by numbers before the products."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x * 0.5).unsqueeze(1), (x / 0.25).unsqueeze(1), 3 * x.unsqueeze(1)
        if self.spelling == "sdpa":
            return nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return torch.softmax(0.3 * (q @ k.transpose(-1, -2)), -1) @ v


@pytest.mark.parametrize("spelling", ["sdpa", "softmax"])
def test_numbers_on_q_and_k_go_into_the_scale_and_values_keep_theirs(spelling: str) -> None:
    model, x = ScaledOperands(spelling), torch.randn(2, 9, 16)
    want = model(x)
    site = subquad.inspect(model, (x,)).sites[0]
    assert site.scale == pytest.approx(0.6)
    assert site.folded == pytest.approx(2.0)
    torch.testing.assert_close(subquad.rewrite(model, example_inputs=(x,), verify=False)(x), want)
    torch._dynamo.reset()
    compiled = torch.compile(ScaledOperands(spelling), backend="subquad", options={"inner": "aot_eager"})
    torch.testing.assert_close(compiled(x), want)


def test_scores_times_zero_are_refused() -> None:
    report = subquad.inspect(ScoredAttention(lambda s: s * 0.0).eval(), (torch.randn(2, 9, 16),))
    assert "by zero" in report.refusals[0].reason


def test_a_tensor_times_the_scores_is_refused() -> None:
    odd = ScoredAttention(lambda s: s * s.abs().mean(-1, keepdim=True)).eval()
    report = subquad.inspect(odd, (torch.randn(2, 9, 16),))
    assert "computed from them" in report.refusals[0].reason


def test_a_user_mask_over_queries_and_keys_is_opaque_and_still_exact() -> None:
    class Masked(nn.Module):
        def forward(self, q: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=allowed)

    q, allowed = torch.randn(2, 2, 7, 4), torch.rand(2, 1, 7, 7) > 0.3
    allowed |= torch.eye(7, dtype=torch.bool)
    model = Masked()
    assert subquad.inspect(model, (q, allowed)).sites[0].mask.family == "opaque"
    want = model(q, allowed)
    fast = subquad.rewrite(model, passes="fuse", example_inputs=(q, allowed))
    assert len(fast.report.applied) == 1
    torch.testing.assert_close(fast(q, allowed), want)


def test_active_attention_dropout_is_refused() -> None:
    class Dropping(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1)

    report = subquad.inspect(Dropping(), (torch.randn(2, 2, 5, 4),))
    assert "dropout is active" in report.refusals[0].reason


def test_symbolic_trace_graphs_are_recognised() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.weights, self.out = nn.Linear(32, 96), nn.Softmax(-1), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(self.weights(q @ k.transpose(1, 2) / math.sqrt(32)) @ v)

    traced = torch.fx.symbolic_trace(Plain().eval())
    want = traced(*X)
    fast = subquad.rewrite(traced, example_inputs=X)
    assert [entry["mask"] for entry in fast.report.applied] == ["full"]
    torch.testing.assert_close(fast(*X), want)


@pytest.mark.parametrize("layer", ["attention", "encoder"])
def test_attention_layers_that_symbolic_trace_keeps_as_leaves_are_opened(layer: str) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.encoder(x) if layer == "encoder" else self.attention(x, x, x)[0])

    model = Around().eval()
    fast = subquad.rewrite(torch.fx.symbolic_trace(model), passes=["fuse"], example_inputs=X)
    assert [(site.path, site.heads) for site in fast.report.sites] == [(layer, 4)]
    other = torch.randn(3, 11, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast(other), model(other))


@pytest.mark.slow
def test_recognition_time_grows_linearly() -> None:
    seconds = {}
    for layers in (8, 32):
        report = subquad.inspect(tiny_llama(layers))
        assert len(report.sites) == layers
        seconds[layers] = report.seconds["recognise"]
    assert seconds[32] < 16 * seconds[8]
