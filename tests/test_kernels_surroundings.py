"""Tests what stands around an operator in torch, against the formulas of the models it comes from, and the words that describe it."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.cohere.modeling_cohere import rotate_half as rotate_pairs
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from subquad.kernels.surroundings import Epilogue, Prologue, Surroundings, finished, prepared

B, T, H, K = 2, 5, 3, 12


def drawn(rotary, shared=False):
    torch.manual_seed(0)
    x = torch.randn(B, T, H, K, dtype=torch.float64)
    angles = torch.rand(1 if shared else B, T, rotary // 2, dtype=torch.float64) * 6
    return x, {"q_cos": angles.cos(), "q_sin": angles.sin(), "q_weight": torch.rand(K, dtype=torch.float64)}


@pytest.mark.parametrize("shared", [False, True])
def test_half_is_the_rotation_of_llama(shared):
    x, tensors = drawn(K, shared)
    cos, sin = (torch.cat([tensors[name]] * 2, -1) for name in ("q_cos", "q_sin"))
    wanted, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(prepared(x, Prologue(rotary=K), "q", tensors), wanted)


def test_interleaved_is_the_rotation_of_cohere():
    x, tensors = drawn(K)
    cos, sin = (tensors[name].repeat_interleave(2, -1)[:, :, None] for name in ("q_cos", "q_sin"))
    wanted = x * cos + rotate_pairs(x) * sin
    torch.testing.assert_close(prepared(x, Prologue(rotary=K, style="interleaved"), "q", tensors), wanted)


def test_deinterleaved_writes_the_pairs_in_halves():
    x, tensors = drawn(K)
    wanted = prepared(x, Prologue(rotary=K, style="interleaved"), "q", tensors)
    wanted = torch.cat([wanted[..., ::2], wanted[..., 1::2]], -1)
    torch.testing.assert_close(prepared(x, Prologue(rotary=K, style="deinterleaved"), "q", tensors), wanted)


def test_a_partial_rotation_leaves_the_other_columns():
    x, tensors = drawn(4)
    found = prepared(x, Prologue(rotary=4, start=6), "q", tensors)
    torch.testing.assert_close(found[..., 6:10], prepared(x[..., 6:10], Prologue(rotary=4), "q", tensors))
    assert torch.equal(found[..., :6], x[..., :6])
    assert torch.equal(found[..., 10:], x[..., 10:])


def test_norms_are_those_of_the_library():
    x, tensors = drawn(K)
    rms = torch.nn.functional.rms_norm(x, (K,), tensors["q_weight"], 0.1)
    torch.testing.assert_close(prepared(x, Prologue("rms", 0.1, True), "q", tensors), rms)
    l2 = torch.nn.functional.normalize(x, dim=-1, eps=0)
    torch.testing.assert_close(prepared(x, Prologue("l2", 0.0), "q", tensors), l2)
    turned = prepared(x, Prologue(rotary=K), "q", tensors)
    wanted = torch.nn.functional.rms_norm(turned, (K,), tensors["q_weight"], 0.1)
    last = Prologue("rms", 0.1, True, norm_last=True, rotary=K)
    torch.testing.assert_close(prepared(x, last, "q", tensors), wanted)
    assert not torch.allclose(prepared(x, dataclasses.replace(last, norm_last=False), "q", tensors), wanted)


@pytest.mark.parametrize(("gate", "act"), [("sigmoid", torch.sigmoid), ("silu", torch.nn.functional.silu)])
def test_an_epilogue_is_a_norm_then_a_gate(gate, act):
    o, tensors = drawn(K)
    tensors |= {"o_gate": torch.randn_like(o), "o_weight": tensors["q_weight"]}
    wanted = torch.nn.functional.rms_norm(o, (K,), tensors["o_weight"], 0.1) * act(tensors["o_gate"])
    torch.testing.assert_close(finished(o, Epilogue("rms", 0.1, True, gate), tensors), wanted)


@given(
    st.sampled_from(["none", "rms", "l2"]), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 2),
    st.sampled_from(["half", "interleaved", "deinterleaved"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_words_are_read_back_and_name_every_tensor(norm, weight, last, pairs, start, style):
    some = norm != "none"
    part = Prologue(norm, 1e-5, weight and some, last and some, 2 * pairs, start, style)
    around = Surroundings(q=part, o=Epilogue("rms", weight=weight, gate="silu"))
    assert Surroundings.parse(around.json()) == around
    _, tensors = drawn(2 * pairs)
    x = torch.randn(B, T, H, K)
    tensors |= {"o_weight": torch.rand(K), "o_gate": torch.randn(B, T, H, K)}
    around.check(x, x, x, tensors)
    for name in around.tensors:
        with pytest.raises(ValueError, match=name):
            around.check(x, x, x, {n: t for n, t in tensors.items() if n != name})
    assert prepared(x.half(), part, "q", tensors).dtype == torch.float16


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Prologue("layer"), "Prologue.norm"),
        (lambda: Prologue(rotary=3), "even"),
        (lambda: Prologue(weight=True), "belong to a norm"),
        (lambda: Epilogue(gate="relu"), "Epilogue.gate"),
        (lambda: Epilogue(weight=True), "belongs to a norm"),
        (lambda: Surroundings.parse('{"v":{}}'), "keys among"),
        (lambda: Surroundings.parse('{"q":{"turn":2}}'), "Surroundings.q"),
    ],
)
def test_what_does_not_fit_is_named(build, said):
    with pytest.raises(ValueError, match=said):
        build()


def test_tensors_that_do_not_fit_are_named():
    x, tensors = drawn(4)
    around = Surroundings(q=Prologue(rotary=4))
    with pytest.raises(ValueError, match="columns 10 to 13 of rows of 12"):
        Surroundings(q=Prologue(rotary=4, start=10)).check(x, x, x, tensors)
    with pytest.raises(ValueError, match="q_sin"):
        around.check(x, x, x, tensors | {"q_sin": tensors["q_sin"][:1]})
    with pytest.raises(ValueError, match=r"q_cos .* but got \[2, 4, 2\]"):
        around.check(x, x, x, tensors | {"q_cos": tensors["q_cos"][:, 1:]})
