"""Arguments that are objects with tensors in them: a cached decode step is captured, rewritten, and updates its cache."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spelled_models import tiny_llama
from torch import nn

import subquad
from subquad.backend import rewrite_dynamo_graph
from subquad.capture import capture
from subquad.ir.report import Report
from subquad.pass_spec import parse_passes

PROMPT = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def filled(model: nn.Module, kind: str) -> Any:
    """A cache that holds the prompt; the first row is padded on the left."""
    caches = pytest.importorskip("transformers.cache_utils")
    cache = caches.DynamicCache(config=model.config)
    if kind == "static":
        cache = caches.StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=PROMPT, attention_mask=seen(8), past_key_values=cache, use_cache=True)
    return cache


def seen(length: int) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def step(cache: Any, token: int, length: int) -> dict[str, Any]:
    return {
        "input_ids": torch.full((2, 1), token),
        "attention_mask": seen(length),
        "past_key_values": cache,
        "use_cache": True,
    }


def assert_equal_caches(one: Any, other: Any) -> None:
    assert int(one.get_seq_length()) == int(other.get_seq_length())
    for mine, its in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(mine.keys, its.keys)
        torch.testing.assert_close(mine.values, its.values)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("spelling", ["eager", "sdpa"])
def test_steps_of_a_rewritten_model_update_the_cache_they_are_given(spelling: str, kind: str) -> None:
    model, reference = tiny_llama(2, spelling).eval(), tiny_llama(2, spelling).eval()
    example = filled(model, kind)
    kept = copy.deepcopy(example)
    fast = subquad.rewrite(model, passes=["fuse"], example_inputs=step(example, 3, 9))
    assert_equal_caches(example, kept)
    assert len(fast.report.applied) == 2
    for site in fast.report.sites:
        assert site.phase == "decode"
        assert "padding(attention_mask)" in site.mask.family
        assert ("lengths(" in site.mask.family) == (kind == "static")
        assert not site.biases
    mine, its = filled(reference, kind), filled(reference, kind)
    tensors = [layer.keys for layer in mine.layers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length, token in ((9, 3), (10, 7), (11, 5)):
            got, want = fast(**step(mine, token, length)), reference(**step(its, token, length))
            torch.testing.assert_close(got.logits, want.logits)
            assert got.past_key_values is mine
            assert type(got) is type(want)
            assert_equal_caches(mine, its)
    same = all(before is layer.keys for before, layer in zip(tensors, mine.layers, strict=True))
    assert same == (kind == "static")


def test_another_kind_of_cache_runs_the_original() -> None:
    model, reference = tiny_llama(2, "sdpa").eval(), tiny_llama(2, "sdpa").eval()
    fast = subquad.rewrite(model, passes=["fuse"], example_inputs=step(filled(model, "dynamic"), 3, 9))
    mine, its = filled(reference, "static"), filled(reference, "static")
    with pytest.warns(UserWarning, match="captured with another kind of past_key_values"):
        got = fast(**step(mine, 3, 9)).logits
    torch.testing.assert_close(got, reference(**step(its, 3, 9)).logits)
    assert_equal_caches(mine, its)
    torch.testing.assert_close(fast(input_ids=PROMPT).logits, reference(input_ids=PROMPT).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_step_through_dynamo_shows_the_same_sites(kind: str) -> None:
    model, reports = tiny_llama(2, "eager").eval(), list[Report]()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        rewritten, report = rewrite_dynamo_graph(graph, inputs, parse_passes("fuse"))
        reports.append(report)
        return rewritten.forward

    torch._dynamo.reset()
    mine, its = filled(model, kind), filled(model, kind)
    got = torch.compile(model, backend=backend)(**step(mine, 3, 9))
    torch.testing.assert_close(got.logits, model(**step(its, 3, 9)).logits)
    assert_equal_caches(mine, its)
    (report,) = reports
    assert [site.phase for site in report.sites] == ["decode", "decode"]
    assert len(report.applied) == 2
    assert all("padding(" in site.mask.family and not site.biases for site in report.sites)
    assert all(("lengths(" in site.mask.family) == (kind == "static") for site in report.sites)


class Memory:
    """What a layer keeps between calls: a tensor that grows, one written in place, a number, and itself."""

    def __init__(self, keys: torch.Tensor, scale: float) -> None:
        self.parts = {"keys": keys}
        self.count = torch.zeros(1, dtype=torch.long)
        self.scale, self.owner = scale, self


class Remembering(nn.Module):
    """Attention to what was given before and now; the memory is positional and not part of the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(16, 16)

    def forward(self, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        memory.parts["keys"] = torch.cat([memory.parts["keys"], x], 1)
        memory.count += x.shape[1]
        keys = memory.parts["keys"].unflatten(-1, (2, 8)).transpose(1, 2)
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, keys, keys, scale=memory.scale) * memory.count


def test_any_object_is_an_argument_and_changes_as_it_did() -> None:
    def memory(scale: float = 0.5) -> Memory:
        return Memory(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)), scale)

    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
    model, fast = (
        Remembering().eval(),
        subquad.rewrite(Remembering().eval(), passes=["fuse"], example_inputs=(memory(), x)),
    )
    assert len(fast.report.applied) == 1
    mine, its = memory(), memory()
    parts, count = mine.parts, mine.count
    for part in (x, x[:, :2], x):
        torch.testing.assert_close(fast(mine, part), model(its, part))
        torch.testing.assert_close(mine.parts["keys"], its.parts["keys"])
        torch.testing.assert_close(mine.count, its.count)
    assert mine.parts is parts
    assert mine.count is count
    assert mine.owner is mine
    with pytest.warns(UserWarning, match="another kind of memory"):
        torch.testing.assert_close(fast(memory(0.7), x), model(memory(0.7), x))
    captured = capture(Remembering().eval(), (memory(), x))
    assert captured.inputs == ("memory_0", "memory_1", "x")
