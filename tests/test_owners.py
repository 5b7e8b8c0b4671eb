"""Which modules get their forward rebound: the smallest that own a site, or the next one up where they do not suffice."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spelled_models import CausalBufferAttention
from torch import nn

import subquad
from subquad.application import rewritten

X = torch.randn(2, 9, 16)


class GivenMask(nn.Module):
    """Attention that takes its mask, or a length, from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None = None, length: int | None = None) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if hidden is None:
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """A block around it; `makes_mask` says which level makes the mask."""

    def __init__(self, makes_mask: bool) -> None:
        super().__init__()
        self.attn, self.makes_mask = GivenMask(), makes_mask

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        if self.makes_mask:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return x + self.attn(x, hidden)


class Stack(nn.Module):
    def __init__(self, masks: tuple[bool, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(makes) for makes in masks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for block in self.blocks:
            x = block(x, hidden)
        return x


class Padded(nn.Module):
    """A root that hands down one row of an additive mask for all queries and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = GivenRow()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x.mean(-1)[:, None, None] * 3)


class GivenRow(GivenMask):
    """Attention that adds what it is given."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return ((q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = GivenMask()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, length=x.shape[1])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.other = CausalBufferAttention(16, 2, 64), CausalBufferAttention(16, 2, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.attn(self.attn(x)))


class Outer(nn.Module):
    """Python around two attentions that no graph can keep alive."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.second = attention, CausalBufferAttention(16, 2, 64)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.dim())
        return self.second(self.first(x))


def bound(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: Outer(CausalBufferAttention(16, 2, 64)), ["first", "second"]),
        (lambda: Outer(nn.Sequential(nn.Linear(16, 16), CausalBufferAttention(16, 2, 64))), ["first.1", "second"]),
        (lambda: Stack((True, True)), ["blocks.0", "blocks.1"]),
        (lambda: Stack((False, True)), [""]),
        (Padded, ["attn"]),
        (Lengths, [""]),
        (Twice, [""]),
    ],
    ids=[
        "own mask",
        "inside a container",
        "mask made by the block",
        "mask made by the root",
        "one row of a mask from the root",
        "a length",
        "called twice",
    ],
)
def test_the_smallest_module_that_shows_the_same_site_is_rebound(model: Any, expected: list[str]) -> None:
    torch.manual_seed(0)
    module = model().eval()
    sites = len(subquad.inspect(module, (X,)).sites)
    inputs = [torch.randn(shape) for shape in ((2, 9, 16), (1, 1, 16), (3, 20, 16))]
    with torch.no_grad():
        want = [module(x) for x in inputs]
        fast = subquad.rewrite(module, example_inputs=(X,))
        assert bound(fast) == expected
        assert len(fast.report.applied) == sites
        assert all(m.passed for m in fast.report.verification)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = [fast(x) for x in inputs]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    subquad.restore(fast)
    assert bound(fast) == []


def test_code_and_hooks_outside_the_owner_stay_alive_and_its_own_hooks_run_once() -> None:
    torch.manual_seed(0)
    module = Outer(CausalBufferAttention(16, 2, 64)).eval()
    ran: list[str] = []
    module.first.register_forward_hook(lambda _m, _a, out: (ran.append("own"), out * 2)[1])
    module.register_forward_hook(lambda _m, _a, out: ran.append("root"))
    with torch.no_grad():
        want = module(X)
        fast = subquad.rewrite(module, example_inputs=(X,), verify=False)
        assert bound(fast) == ["first", "second"]
        ran.clear()
        module.seen.clear()
        torch.testing.assert_close(fast(X), want)
    assert ran == ["own", "root"]
    assert module.seen == [3]


def test_a_rewrite_under_a_rebound_owner_is_what_runs() -> None:
    module = Outer(CausalBufferAttention(16, 2, 64)).eval()
    fast = subquad.rewrite(
        module, example_inputs=(X,), passes="linearize:lolcats(window=2)", where="second", verify=False
    )
    assert bound(fast) == ["second"]
    before = fast(X)
    with torch.no_grad():
        fast.second.subquad.window_gate.add_(3.0)
    assert not torch.equal(fast(X), before)
    other = copy.deepcopy(fast)
    assert torch.equal(other(X), fast(X))
    with torch.no_grad():
        other.second.qkv.weight.zero_()
    assert not torch.equal(other(X), fast(X))
    assert subquad.restore(other) is other
    assert bound(other) == []
    assert bound(fast) == ["second"]


def test_the_decoder_and_the_plan_come_from_the_whole_model() -> None:
    fast = subquad.rewrite(Outer(CausalBufferAttention(16, 2, 64)).eval(), example_inputs=(X,))
    record = rewritten(fast)
    assert [step.path for step in fast.report.plan.steps] == ["first", "second"]
    names = [str(node.target) for node in record.applied.graph.graph.nodes]
    assert sum("subquad.softmax_attention" in name for name in names) == 2
    assert record.applied.root is fast


def test_sites_inside_one_another_share_the_outer_owner() -> None:
    class Around(nn.Module):
        """An attention of its own beside that of a submodule."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.qkv = CausalBufferAttention(16, 2, 64), nn.Linear(16, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.inner(x)).unsqueeze(1).chunk(3, -1)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)

    fast = subquad.rewrite(nn.Sequential(Around(), nn.Linear(16, 16)).eval(), example_inputs=(X,))
    assert {entry["path"] for entry in fast.report.applied} == {"0", "0.inner"}
    assert bound(fast) == ["0"]
    names = [str(node.target) for node in rewritten(fast).bound["0"].graph.graph.nodes]
    assert sum("subquad.softmax_attention" in name for name in names) == 2


def test_attention_that_goes_past_the_registry_keeps_its_own_masks() -> None:
    """BigBirdPegasus's encoder adds the mask that Hugging Face built, which the registry's masks would make boolean."""
    from transformers import BigBirdPegasusConfig, BigBirdPegasusForConditionalGeneration

    torch.manual_seed(0)
    sizes = {
        "d_model": 32,
        "vocab_size": 64,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 64,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BigBirdPegasusConfig(**sizes, **layers, attention_type="original_full", attn_implementation="eager")
    model = BigBirdPegasusForConditionalGeneration(config).eval()
    ids, padded = torch.randint(3, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padded[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": padded, "decoder_input_ids": ids, "use_cache": False}
    with torch.no_grad():
        before = model(**inputs).logits
        subquad.rewrite(model, passes=["fuse"], example_inputs=inputs | {"attention_mask": torch.ones_like(padded)})
        after = model(**inputs).logits
    assert torch.allclose(after, before, atol=1e-5)


def test_a_mask_that_more_than_attention_reads_stays_as_it_is() -> None:
    """NLLB-MoE's routers read hidden tokens off the mask of the attention, which the registry's masks would invert."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Layer(LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> torch.Tensor:
            last = ~attention_mask[:, 0, -1].bool()
            return super().forward(hidden_states, attention_mask=attention_mask, **rest) * last[..., None]

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(3, 64, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][0, -3:] = 0
    assert bound(subquad.rewrite(model, passes=["fuse"], example_inputs={**inputs, "use_cache": False})) == []
    subquad.restore(model)
    model.model.layers[0] = Layer(config, 0).eval()
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        fast = subquad.rewrite(model, passes=["fuse"], example_inputs={**inputs, "use_cache": False})
        assert len(fast.report.applied) == 1
        assert bound(fast) != []
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, before)
