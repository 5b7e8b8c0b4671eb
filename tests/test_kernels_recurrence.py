"""Tests the recurrence: chunks and steps against the token-by-token fp64 definition, and that against independent formulas."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.kernels import RecurrenceSpec, recurrence, recurrence_reference, recurrence_torch
from subquad.kernels import recurrence_forms as forms

HEDGEHOG = ("softmax(x @ w0)", "softmax(-(x @ w0))")
STATE = ("state", "window_k", "window_v", "seen")


def case(batch=2, length=20, heads=4, kv_heads=2, width=5, value=6, hidden=3, dtype=torch.float64, seed=0, **spec):
    torch.manual_seed(seed)
    what = RecurrenceSpec(**{"feature_map": HEDGEHOG, "scale": width**-0.5} | spec)
    return {
        "q": torch.randn(batch, length, heads, width, dtype=dtype),
        "k": torch.randn(batch, length, kv_heads, width, dtype=dtype),
        "v": torch.randn(batch, length, kv_heads, value, dtype=dtype),
        "decay": None, "beta": None,
        "feature_q": [torch.randn(heads, width, hidden, dtype=dtype)], "feature_k": [torch.randn(heads, width, hidden, dtype=dtype)],
        "window_gate": torch.randn(heads, dtype=dtype), "valid": None,
        "state": None, "window_k": None, "window_v": None, "seen": None, "cu_seqlens": None, "spec": what.json(),
    }  # fmt: skip


def close(got, wanted, tolerance=1e-10):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def in_pieces(arguments, cuts, form=recurrence):
    outs, bounds = [], [0, *sorted(cuts), arguments["q"].shape[1]]
    for start, stop in itertools.pairwise(bounds):
        tokens = {
            name: arguments[name] if arguments[name] is None else arguments[name][:, start:stop]
            for name in ("q", "k", "v", "valid")
        }
        o, *state = form(**arguments | tokens)
        outs.append(o)
        arguments = arguments | dict(zip(STATE, state, strict=True))
    return torch.cat(outs, 1), *state


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (1, 0), (3, 5), (16, 4), (64, 4), (150, 0)])
def test_chunks_equal_the_definition(length, window, sinks):
    arguments = case(length=length, window=window, sinks=sinks)
    wanted = recurrence_reference(**arguments)
    close(recurrence(**arguments), wanted)
    close(recurrence_torch(**arguments), wanted)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 90), st.sampled_from([(4, 2), (3, 3), (3, 1)]), st.integers(0, 9), st.integers(0, 3),
    st.booleans(), st.lists(st.integers(1, 89), max_size=5), st.integers(0, 99),
)  # fmt: skip
def test_prefill_and_steps_equal_the_full_call(batch, length, heads, window, sinks, padded, cuts, seed):
    arguments = case(batch, length, *heads, seed=seed, window=window, sinks=sinks if window else 0)
    if padded:
        arguments["valid"] = torch.rand(batch, length) > 0.4
        arguments["valid"][0] = False
    wanted = recurrence_reference(**arguments)
    close(recurrence(**arguments), wanted)
    close(in_pieces(arguments, {cut for cut in cuts if cut < length}), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_real_tokens(side):
    arguments = case(1, 30, window=8, sinks=2)
    wide = {
        name: torch.nn.functional.pad(arguments[name], (0, 0, 0, 0, *((7, 0) if side == "left" else (0, 7))))
        for name in "qkv"
    }
    wide["valid"] = torch.ones(1, 37, dtype=torch.bool)
    real = slice(7, None) if side == "left" else slice(0, 30)
    wide["valid"][:] = False
    wide["valid"][:, real] = True
    wide["k"] = wide["k"] + 100 * ~wide["valid"][..., None, None]
    o, *state = recurrence(**arguments | wide)
    plain, *plain_state = recurrence(**arguments)
    close([o[:, real], *state], [plain, *plain_state])
    assert (o[~wide["valid"]] == 0).all()


def test_definition_equals_the_quadratic_formula():
    arguments = case(1, 23, 2, 2, window=4, sinks=3)
    q, k, v = (arguments[name][0].transpose(0, 1) for name in "qkv")
    (wq,), (wk,) = arguments["feature_q"], arguments["feature_k"]
    fq = torch.cat([(q @ wq).softmax(-1), (-(q @ wq)).softmax(-1)], -1)
    fk = torch.cat([(k @ wk).softmax(-1), (-(k @ wk)).softmax(-1)], -1)
    i, j = torch.arange(23)[:, None], torch.arange(23)[None]
    near = (j <= i) & ((i - j < 4) | (j < 3))
    score = (q @ k.mT * 5**-0.5).masked_fill(~near, -torch.inf)
    weight = torch.sigmoid(arguments["window_gate"])[:, None, None] * torch.exp(score - score.amax(-1, keepdim=True))
    weight = weight + (fq @ fk.mT) * ((j <= i) & ~near)
    wanted = (weight @ v / weight.sum(-1, keepdim=True)).transpose(0, 1)[None]
    close([recurrence_reference(**arguments)[0]], [wanted])


def test_window_covering_everything_is_softmax_attention_for_any_gate():
    arguments = case(2, 17, window=17)
    arguments["window_gate"] = torch.tensor([-9.0, 0.0, 3.0, 9.0], dtype=torch.float64)
    q, k, v = (x.transpose(1, 2) for x in (arguments["q"], arguments["k"], arguments["v"]))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=5**-0.5, enable_gqa=True)
    close([recurrence(**arguments)[0]], [wanted.transpose(1, 2)])


def test_long_half_precision_input_keeps_its_denominator(monkeypatch):
    arguments = case(1, 3000, 2, 1, 8, 8, 8, window=16, sinks=2)
    wanted = recurrence(**arguments)[0]
    half = {
        name: [x.bfloat16() for x in value]
        if isinstance(value, list)
        else value.bfloat16()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    o, state, *_ = recurrence(**half)
    assert state.dtype == torch.float32
    error = (o.double() - wanted).norm() / wanted.norm()
    assert error < 0.02, error
    monkeypatch.setattr(forms, "BLOCK", 4096)
    close([recurrence(**arguments)[0]], [wanted])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"q": torch.randn(2, 20, 3, 5)}, "multiple"),
        ({"decay": torch.zeros(4)}, "decay"),
        ({"seen": torch.zeros(2).long()}, "initial state"),
        ({"feature_k": []}, "w0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        recurrence(**case() | change)
