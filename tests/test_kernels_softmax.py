"""Tests softmax attention against a row-by-row fp64 reference, and the algebra of its partial states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.kernels import (
    SoftmaxSpec,
    merge,
    merge_all,
    softmax_attention,
    softmax_attention_reference,
    softmax_attention_torch,
)

MASKS = [
    None,
    "q >= kv",
    "(q >= kv) & (q - kv < 5)",
    "(q >= kv) & ((q - kv < 3) | (kv < 2))",
    "t0[b, kv] & (q >= kv)",
    "q > kv + h",
    "kv % 2 == s0",
    "(j < s0) | bit(t1[b, i], j - s0) & (q - kv < 9)",
]


def case(batch=2, q_len=5, lens=(7,), heads=4, kv_heads=2, width=8, value=8, dtype=torch.float64, seed=0, **spec):
    torch.manual_seed(seed)
    return {
        "q": torch.randn(batch, q_len, heads, width, dtype=dtype),
        "k": [torch.randn(batch, n, kv_heads, width, dtype=dtype) for n in lens],
        "v": [torch.randn(batch, n, kv_heads, value, dtype=dtype) for n in lens],
        "rows": [], "lengths": [], "positions": [], "q_positions": None, "bias": None, "sinks": None,
        "operands": [torch.rand(batch, sum(lens)) > 0.4, torch.randint(0, 1 << 40, (batch, q_len))], "scalars": [1],
        "spec": SoftmaxSpec(**{"scale": 0.3} | spec).json(),
    }  # fmt: skip


def compare(arguments, tolerance=1e-12):
    o, lse = softmax_attention_reference(**arguments)
    for form in (softmax_attention, softmax_attention_torch):
        got, got_lse = form(**arguments)
        assert got.dtype == arguments["q"].dtype
        torch.testing.assert_close(got.double(), o, rtol=tolerance, atol=tolerance, equal_nan=True)
        torch.testing.assert_close(got_lse.double(), lse, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 20), st.lists(st.integers(0, 18), min_size=1, max_size=3), st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    st.sampled_from([(8, 8), (5, 7)]), st.sampled_from(MASKS), st.sampled_from([None, 2.0]), st.sampled_from(["zero", "mean", "nan"]),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_every_form_equals_the_reference(
    batch, q_len, lens, heads, widths, mask, softcap, empty, sinks, bias, ragged, seed
):
    arguments = case(batch, q_len, lens, *heads, *widths, seed=seed, mask=mask, softcap=softcap, empty_rows=empty)
    if sinks:
        arguments["sinks"] = torch.randn(heads[0], dtype=torch.float64)
    if bias:
        arguments["bias"] = torch.randn(heads[0], 1, sum(lens), dtype=torch.float64)
    if ragged:
        arguments["rows"] = [torch.randint(0, batch, (batch,)) for _ in lens]
        arguments["lengths"] = [torch.randint(0, n + 1, (batch,)) for n in lens]
        arguments["positions"] = [torch.randint(0, 20, (batch, n)) for n in lens]
        arguments["q_positions"] = torch.randint(0, 20, (batch, q_len))
    compare(arguments)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("q_len", [1, 300])
def test_block_form_equals_the_reference(mask, q_len):
    arguments = case(2, q_len, (300,), mask=mask)
    if q_len == 1:
        arguments["q_positions"] = torch.tensor([[299], [120]])
    compare(arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_near_fp64(dtype, tolerance):
    compare(case(2, 40, (40,), 6, 2, 16, 16, dtype, mask="q >= kv"), tolerance)


def test_causal_is_top_left_and_a_decode_step_sees_its_past():
    full = case(1, 9, (9,), mask="q >= kv")
    o, lse = softmax_attention(**full)
    step = full | {"q": full["q"][:, 6:], "q_positions": torch.tensor([[6, 7, 8]])}
    o_step, lse_step = softmax_attention(**step)
    torch.testing.assert_close(o_step, o[:, 6:])
    torch.testing.assert_close(lse_step, lse[:, 6:])


def test_segments_with_row_maps_equal_the_gathered_batch():
    split = case(3, 4, (6, 5))
    split["k"][0], split["v"][0] = split["k"][0][:1], split["v"][0][:1]
    split["rows"] = [torch.zeros(3, dtype=torch.int64), torch.tensor([2, 0, 1])]
    joined = split | {
        "rows": [],
        "k": [torch.cat([split["k"][0].expand(3, -1, -1, -1), split["k"][1][[2, 0, 1]]], 1)],
        "v": [torch.cat([split["v"][0].expand(3, -1, -1, -1), split["v"][1][[2, 0, 1]]], 1)],
    }
    torch.testing.assert_close(softmax_attention(**split), softmax_attention(**joined))


@pytest.mark.parametrize("q_len", [1, 3])
def test_empty_rows(q_len):
    for empty, wanted in (("zero", 0.0), ("nan", float("nan"))):
        o, lse = softmax_attention(**case(2, q_len, mask="q < 0", empty_rows=empty))
        assert (lse == -torch.inf).all()
        torch.testing.assert_close(o, torch.full_like(o, wanted), equal_nan=True)
    arguments = case(2, q_len, mask="q < 0", empty_rows="mean")
    o, _ = softmax_attention(**arguments)
    torch.testing.assert_close(o[:, 0], arguments["v"][0].mean(1).repeat_interleave(2, 1))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=5), st.sampled_from([1.0, 1e4]), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_merge_over_any_partition_is_the_whole(sizes, magnitude, seed):
    arguments = case(1, 3, [*sizes, 1], seed=seed, dtype=torch.float64)
    arguments["q"] *= magnitude
    parts = [
        softmax_attention(**arguments | {"k": [k], "v": [v]})
        for k, v in zip(arguments["k"], arguments["v"], strict=True)
    ]
    whole, whole_lse = softmax_attention_reference(**arguments)
    o, lse = merge_all([p[0] for p in parts], [p[1] for p in parts])
    torch.testing.assert_close(o, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)
    (a, la), (b, lb), (c, lc) = parts[0], parts[1], parts[-1]
    left = merge(*merge(a, la, b, lb), c, lc)
    right = merge(a, la, *merge(b, lb, c, lc))
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_merge_of_two_empty_states_is_empty():
    o, lse = merge(torch.zeros(2, 3), torch.full((2,), -torch.inf), torch.zeros(2, 3), torch.full((2,), -torch.inf))
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"k": []}, "segments"),
        ({"lengths": [torch.ones(2).long()] * 2}, "lengths"),
        ({"k": [torch.randn(2, 7, 2, 9, dtype=torch.float64)]}, "segment 0"),
        ({"q": torch.randn(3, 5, 4, 8, dtype=torch.float64)}, "rows"),
        ({"q": torch.randn(2, 5, 5, 8, dtype=torch.float64)}, "multiple"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        softmax_attention(**case() | change)


@pytest.mark.parametrize("which", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("mask", [None, "q >= kv"])
@pytest.mark.parametrize("length", [1, 9, 150])
def test_operands_may_have_any_strides(which, mask, length):
    arguments = case(q_len=length, lens=(length,), mask=mask, dtype=torch.float32)
    if which == "bias":
        arguments["bias"] = torch.randn(2, 4, length, length).transpose(2, 3)
    else:
        turned = lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)  # noqa: E731
        held = arguments[which]
        arguments[which] = turned(held) if which == "q" else [turned(x) for x in held]
    compare(arguments, tolerance=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([(4, 2), (3, 3), (6, 1)]), st.integers(0, 4), st.integers(1, 5),
    st.booleans(), st.sampled_from(MASKS), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["zero", "mean", "nan"]),
    st.integers(0, 9),
)  # fmt: skip
def test_page_lists_equal_the_reference(
    batch, q_len, heads, pages, size, by_head, mask, tail, placed, bias, empty, seed
):
    pool = 6
    arguments = case(batch, q_len, (4,), *heads, 5, 7, seed=seed, mask=mask, empty_rows=empty)
    slots = pages * size + 4
    arguments["k"].insert(0, torch.randn(pool, size, heads[1], 5, dtype=torch.float64))
    arguments["v"].insert(0, torch.randn(pool, size, heads[1], 7, dtype=torch.float64))
    table = torch.randint(-1, pool, (batch, heads[1] if by_head else 1, pages))
    arguments["rows"] = [table, torch.randint(0, batch, (batch,))]
    if tail:
        arguments["lengths"] = [torch.randint(0, pages * size + 1, (batch,)), torch.randint(0, 5, (batch,))]
    if placed:
        arguments["positions"] = [torch.randint(0, 20, (pool, size)), torch.randint(0, 20, (batch, 4))]
        arguments["q_positions"] = torch.randint(0, 20, (batch, q_len))
    arguments["bias"] = torch.randn(heads[0], 1, slots, dtype=torch.float64) if bias else None
    compare(arguments)


def test_page_lists_have_no_gradient():
    q, pool = torch.randn(1, 1, 2, 4, requires_grad=True), torch.randn(3, 2, 2, 4)
    spec = SoftmaxSpec(0.5).json()
    o, _ = softmax_attention(q, [pool], [pool], [torch.tensor([[[0, 2]]])], [], [], None, None, None, [], [], spec)
    with pytest.raises(ValueError, match="page lists"):
        o.sum().backward()
