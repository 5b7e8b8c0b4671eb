"""Softmax attention of few query rows in C++ against the float64 reference: masks, softcaps, row maps, ragged and empty rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subquad import native_library
from subquad.kernels import (
    SoftmaxSpec,
    native_code,
    softmax_attention,
    softmax_attention_reference,
    softmax_cpu,
    softmax_native,
)

MASKS = [
    None, "q >= kv", "(q >= kv) & (q - kv < 5)", "(q >= kv) & ((q - kv < 3) | (kv < 2))", "t0[b, kv] & (q >= kv)", "q < 0",
    "(j < s0) | bit(t1[b, i], j - s0) & (q - kv < 9)", "q > kv + h",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def native(native_path):
    before = list(native_code._loaded)
    native_library.load(native_path)
    yield
    native_code._loaded[:] = before


@pytest.fixture
def calls(monkeypatch):
    """How many segments each call gave to the C++ form."""
    seen = []

    def watched(q, parts, *rest):
        seen.append(len(parts))
        softmax_native.add_stored(q, parts, *rest)

    monkeypatch.setattr(softmax_cpu, "add_stored", watched)
    return seen


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.sampled_from([1, 2, 5, 19]), q_len=st.sampled_from([1, 2, 5, 16]), lens=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 2), (3, 3), (6, 1), (16, 2)]), widths=st.sampled_from([(8, 8), (5, 7), (24, 40), (64, 64), (96, 80)]),
    mask=st.sampled_from(MASKS), softcap=st.sampled_from([None, 0.5, 20.0]), empty=st.sampled_from(["zero", "mean", "nan"]),
    sinks=st.booleans(), ragged=st.booleans(), mapped=st.booleans(), low=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_call_equals_the_reference(
    batch, q_len, lens, heads, widths, mask, softcap, empty, sinks, ragged, mapped, low, seed
):
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if low else torch.float32
    stored = [1 + seed % 3 if mapped else batch for _ in lens]
    k, v = (
        [torch.randn(n, t, heads[1], width).to(dtype) for n, t in zip(stored, lens, strict=True)] for width in widths
    )
    arguments = {
        "q": torch.randn(batch, q_len, heads[0], widths[0]), "k": k, "v": v,
        "rows": [torch.randint(0, n, (batch,)) for n in stored] if mapped else [],
        "lengths": [torch.randint(0, t + 1, (batch,)) for t in lens] if ragged else [], "positions": [],
        "q_positions": torch.randint(0, sum(lens) + 1, (batch, q_len)), "bias": None,
        "sinks": torch.randn(heads[0]) if sinks else None,
        "operands": [torch.rand(batch, sum(lens)) > 0.4, torch.randint(0, 1 << 40, (batch, q_len))], "scalars": [1],
        "spec": SoftmaxSpec(scale=widths[0] ** -0.5, mask=mask, softcap=softcap, empty_rows=empty).json(),
    }  # fmt: skip
    got, lse = softmax_attention(**arguments)
    want, want_lse = softmax_attention_reference(**arguments)
    torch.testing.assert_close(lse.double(), want_lse, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-6)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("width", [16, 32, 40, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("value", [None, 24, 100])
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
def test_head_sizes_and_rows(width, value, rows, calls):
    """Rows in lanes and not; 40 rows are three vectors of which the last is part empty."""
    torch.manual_seed(width)
    q, k, v = torch.randn(rows, 1, 4, width), torch.randn(1, 150, 2, width), torch.randn(1, 150, 2, value or width)
    own = torch.randn(rows, 7, 2, width), torch.randn(rows, 7, 2, value or width)
    maps = [torch.zeros(rows, dtype=torch.int64), torch.empty(0, dtype=torch.int64)]
    rest = (maps, [], [], None, None, None, [], [], SoftmaxSpec(width**-0.5).json())
    got = softmax_attention(q, [k, own[0]], [v, own[1]], *rest)
    want = softmax_attention_reference(q, [k, own[0]], [v, own[1]], *rest)
    assert calls == [2]
    for one, other, bound in zip(got, want, (2e-6, 1e-6), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


def test_many_tasks_of_one_row_merge_in_any_order(calls):
    """A long segment is cut into tasks; huge and equal scores keep their place."""
    torch.manual_seed(0)
    for factor in (0.0, 1.0, 100.0):
        q, k, v = factor * torch.randn(2, 3, 6, 32), torch.randn(2, 3000, 2, 32), torch.randn(2, 3000, 2, 32)
        at = torch.full((2, 3), 3000)
        rest = ([], [], [], at, None, None, [], [], SoftmaxSpec(1.0, mask="(q >= kv) & (q - kv < 2900)").json())
        got, lse = softmax_attention(q, [k], [v], *rest)
        want, want_lse = softmax_attention_reference(q.double(), [k.double()], [v.double()], *rest)
        torch.testing.assert_close(lse.double(), want_lse, rtol=3e-7, atol=1e-6)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 if factor < 2 else 2e-3)
    assert sum(calls) == 3


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("batch", [2, 20])
def test_heads_that_are_read_together_keep_their_own_keys(batch, heads_first, calls):
    torch.manual_seed(0)
    q = torch.randn(batch, 1, 10, 256)
    k, v = (torch.randn(batch, 5, 150, 256) if heads_first else torch.randn(batch, 150, 5, 256) for _ in range(2))
    if heads_first:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    rows = [torch.zeros(batch, dtype=torch.int64)]
    arguments = (q, [k], [v], rows, [], [], None, None, None, [], [], SoftmaxSpec(scale=0.0625).json())
    got, lse = softmax_attention(*arguments)
    want, want_lse = softmax_attention_reference(*arguments)
    assert calls == [1]
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


def test_gradients_go_through_calls_that_the_c_form_answers(calls):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, 2, 8, requires_grad=True) for n in (1, 9, 9))
    o, lse = softmax_attention(q, [k], [v], [], [], [], None, None, None, [], [], SoftmaxSpec(0.3).json())
    assert calls == [1]
    found = torch.autograd.grad(o.square().sum() + lse.sum(), (q, k, v))
    score = torch.einsum("bqhd,bnhd->bhqn", q, k) * 0.3
    plain = torch.einsum("bhqn,bnhd->bqhd", score.softmax(-1), v)
    wanted = torch.autograd.grad(plain.square().sum() + score.logsumexp(-1).sum(), (q, k, v))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("odd", ["fp16", "strided head", "fp64"])
def test_what_has_no_form_runs_in_torch(odd, calls):
    torch.manual_seed(0)
    dtype = {"fp16": torch.float16, "fp64": torch.float64}.get(odd, torch.float32)
    q, k, v = (torch.randn(2, n, 2, 8).to(dtype) for n in (1, 5, 5))
    if odd == "strided head":
        k = torch.randn(2, 5, 2, 16)[..., ::2]
    rest = ([], [], [], None, None, None, [], [], SoftmaxSpec(0.3).json())
    got = softmax_attention(q, [k], [v], *rest)[0]
    want = softmax_attention_reference(q, [k], [v], *rest)[0]
    assert calls == []
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3 if dtype == torch.float16 else 1e-6)
