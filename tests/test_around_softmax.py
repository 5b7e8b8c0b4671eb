"""Everything that may stand around a softmax: scales, caps, masks, biases, sinks, and every spelling of the two products."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from written import around_scores, equations, near_misses
from written.case import Case
from written.heads import Heads, raw
from written.judge import assert_within_contract
from written.table import parameters
from written.trial import assert_found, check

import subquad
from subquad.ir.errors import CaptureError

SCHOOLS = {"scores": around_scores.CASES, "near": near_misses.CASES, "equations": equations.CASES}
BOTH = frozenset(
    ["scale on both sides", "exp over sum, masked, amax subtracted", "sink logits", "alibi", "a factor per key", "groups by einsum"]
)  # fmt: skip


@pytest.mark.parametrize(("case", "dialect"), parameters(SCHOOLS, frozenset(["near"]), BOTH))
def test_around_the_softmax(case: Case, dialect: str) -> None:
    if "einops" in case.name:
        pytest.importorskip("einops")
    check(case, dialect)


LOWEST = torch.finfo(torch.float32).min


def _attend(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, -1) @ v


EMPTY_ROWS: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "filled with -inf": (lambda q, k, v, hidden: _attend(raw(q, k).masked_fill(hidden, -torch.inf), v), "nan"),
    "filled with the lowest": (lambda q, k, v, hidden: _attend(raw(q, k).masked_fill(hidden, LOWEST), v), "mean"),
    "lowest added": (lambda q, k, v, hidden: _attend(raw(q, k) + hidden.float() * LOWEST, v), "mean"),
    "where, lowest": (lambda q, k, v, hidden: _attend(torch.where(hidden, LOWEST, raw(q, k)), v), "mean"),
    "sdpa": (lambda q, k, v, hidden: F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden), "zero"),
    "sdpa, additive -inf": (
        lambda q, k, v, hidden: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -torch.inf)
        ), "zero",
    ),
    "nan_to_num": (
        lambda q, k, v, hidden: torch.nan_to_num(torch.softmax(raw(q, k).masked_fill(hidden, -torch.inf), -1)) @ v, "zero",
    ),
    "filled again with zero": (
        lambda q, k, v, hidden: torch.softmax(raw(q, k).masked_fill(hidden, LOWEST), -1).masked_fill(hidden, 0.0) @ v, "zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", EMPTY_ROWS)
def test_rows_without_keys_keep_the_value_of_their_spelling(spelling: str) -> None:
    core, value = EMPTY_ROWS[spelling]

    class Padded(nn.Module):
        """Left padding under a triangle: the padded queries see nothing."""

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            t = q.shape[2]
            return core(q, k, v, torch.ones(t, t, dtype=torch.bool).triu(1) | ~real[:, None, None, :].bool())

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    real = torch.arange(9).expand(2, 9) >= torch.tensor([[0], [4]])
    plain = Padded()
    want = plain(q, k, v, real)[1, :, :4]
    meant = {
        "zero": torch.zeros(4, 4, 8),
        "nan": torch.full((4, 4, 8), torch.nan),
        "mean": v[1].mean(1)[:, None].expand(-1, 4, -1),
    }
    torch.testing.assert_close(want, meant[value], equal_nan=True)
    fast = subquad.rewrite(Padded(), passes="fuse", example_inputs=(q, k, v, real))
    assert [site.mask.empty_rows for site in fast.report.sites] == [value]
    assert len(fast.report.applied) == 1, fast.report.rolled_back
    for start in (0, 2):
        part = tuple(x[:, :, start:] for x in (q, k, v))
        assert_within_contract(fast, plain, copy.deepcopy(plain), (*part, real[:, start:]))


HALF = {
    "scores and softmax in half": lambda q, k, v: torch.softmax(raw(q, k), -1) @ v,
    "softmax in float32": lambda q, k, v: torch.softmax(raw(q, k), -1, dtype=torch.float32).to(q.dtype) @ v,
    "scores in float32": lambda q, k, v: (torch.softmax(raw(q.float(), k.float()), -1) @ v.float()).to(q.dtype),
    "masked, softmax in float32": lambda q, k, v: torch.softmax(
        raw(q, k).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), torch.finfo(q.dtype).min).float(), -1
    ).to(q.dtype) @ v,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("spelling", HALF)
def test_half_precision_stays_within_the_contract(spelling: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Heads(HALF[spelling]).eval().to(dtype)
    x = torch.randn(2, 33, 32).to(dtype)
    plain = copy.deepcopy(model)
    fast = subquad.rewrite(model, passes="fuse", example_inputs=(x,))
    assert len(fast.report.applied) == 1, fast.report.rolled_back
    assert_within_contract(fast, plain, copy.deepcopy(plain), (x,))


@pytest.mark.parametrize("before", [True, False], ids=["on the scores", "on the probabilities"])
def test_active_dropout_is_refused_in_training_and_by_function(before: bool) -> None:
    model = Heads(around_scores.HiddenAtRandom(before))
    with pytest.raises(CaptureError, match=r"call model.eval\(\)"):
        subquad.inspect(model, (torch.randn(2, 9, 32),))

    def always(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = F.dropout(raw(q, k), 0.1, training=before)
        return F.dropout(torch.softmax(scores, -1), 0.1, training=not before) @ v

    report = subquad.inspect(Heads(always).eval(), (torch.randn(2, 9, 32),))
    assert not report.sites
    assert [refusal for refusal in report.refusals if "dropout" in refusal.reason]


def test_the_judge_sees_a_wrong_scale() -> None:
    torch.manual_seed(0)
    model = Heads(HALF["sdpa"]).eval()
    wrong = copy.deepcopy(model)
    wrong.core = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3536)
    with pytest.raises(AssertionError, match="WRONG: error"):
        assert_within_contract(wrong, model, copy.deepcopy(model), (torch.randn(2, 9, 32),))


def test_a_table_fails_when_the_expectation_is_wrong() -> None:
    case = next(case for case in around_scores.CASES if case.name == "softcap")
    report = subquad.inspect(case.model(), case.call())
    assert_found(case, report)
    for words in ({"softcap": 31.0}, {"mask": "causal"}, {"heads": 2}):
        with pytest.raises(AssertionError):
            assert_found(replace(case, sites=(words,)), report)
    with pytest.raises(AssertionError, match="0 sites"):
        assert_found(replace(case, sites=(), refused=("",)), report)
