"""Models whose error few outputs make up: it is estimated over many calls, and neither luck nor a defect decides."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import subquad
from subquad import verification
from subquad.application import rewritten
from subquad.estimated_error import allowed_error, effective_rows, relative_error
from subquad.redrawn_inputs import redrawn
from subquad.verification import end_to_end_rungs


class Score(nn.Module):
    """One number for a sequence, by two layers of attention and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.head = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 4, 8)).movedim(1, 3).unbind(1)
            x = x + (torch.softmax(q @ k.mT * 8**-0.5, -1) @ v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


def test_one_output_is_judged_over_many_calls() -> None:
    torch.manual_seed(0)
    model = Score().eval()
    inputs = [torch.randn(1, 11, 32) for _ in range(12)]
    plain = [model(x).detach() for x in inputs]
    fast = subquad.rewrite(model, passes=["fuse"], example_inputs=(inputs[0],))
    assert len(fast.report.applied) == 2
    assert not fast.report.rolled_back
    record = rewritten(fast)
    assert record is not None
    wide = Score().double()
    wide.load_state_dict(model.state_dict())
    exact = [wide.eval()(x.double()).detach() for x in inputs]
    unlucky = 0
    for x, before, judge in zip(inputs, plain, exact, strict=True):
        unlucky += relative_error(fast(x).detach(), judge) > allowed_error(relative_error(before, judge), torch.float32)
        logits = end_to_end_rungs(fast, record, (x,))[0]
        assert logits.passed, f"{logits.error} above {logits.allowed}"
    assert unlucky, "one call alone decides nowhere wrongly: the test shows nothing"


def test_a_defect_stays_one() -> None:
    torch.manual_seed(0)
    model, x = Score().eval(), torch.randn(1, 11, 32)
    fast = subquad.rewrite(model, passes=["fuse"], example_inputs=(x,))
    record = rewritten(fast)
    assert record is not None
    twin = model_like(model, Score)
    call = verification._call

    def wrong(root: nn.Module, *given: Any) -> Any:
        return call(root, *given) * (1 + 3e-6 * (root is fast))

    assert end_to_end_rungs(fast, record, (x,), twin)[0].passed
    with mock.patch.object(verification, "_call", wrong):
        assert not end_to_end_rungs(fast, record, (x,), twin)[0].passed


class Undecided(nn.Module):
    """Attention with scores of some thousands: a row that is undecided between two keys has an error a thousand times the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).movedim(1, 3).unbind(1)
        return (torch.softmax(q @ k.mT * 1000, -1) @ v).transpose(1, 2).flatten(2)


def test_one_row_that_outweighs_the_others_is_judged_over_many_calls() -> None:
    torch.manual_seed(0)
    model = Undecided().eval()
    inputs = [torch.randn(2, 11, 32) for _ in range(60)]
    plain = [model(x).detach() for x in inputs]
    fast = subquad.rewrite(model, passes=["fuse"], example_inputs=(inputs[0],))
    assert len(fast.report.applied) == 1
    assert not fast.report.rolled_back
    record = rewritten(fast)
    assert record is not None
    wide = Undecided().double().eval()
    wide.load_state_dict(model.state_dict())
    unlucky = []
    for x, before in zip(inputs, plain, strict=True):
        judge, after = wide(x.double()).detach(), fast(x).detach()
        if relative_error(after, judge) > allowed_error(relative_error(before, judge), torch.float32):
            unlucky.append(x)
            assert effective_rows([(judge, before, after)]) < 2
    assert unlucky, "one call alone decides nowhere wrongly: the test shows nothing"
    for x in unlucky[:4]:
        logits = end_to_end_rungs(fast, record, (x,))[0]
        assert logits.passed, f"{logits.error} above {logits.allowed}"

    call = verification._call

    def wrong(root: nn.Module, capture: Any, given: Any) -> Any:
        value = call(root, capture, given)
        return value if root is not fast else judged(given) + 4 * (value - judged(given))

    def judged(given: Any) -> torch.Tensor:
        return wide(next(iter(given.values())).double())

    with mock.patch.object(verification, "_call", wrong):
        assert not end_to_end_rungs(fast, record, (inputs[0],), model_like(model, Undecided))[0].passed


def model_like(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Another module with the same weights and the original forward."""
    twin = kind().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_rows_are_counted_by_their_share_of_the_error() -> None:
    judge = torch.zeros(2, 5, 3, dtype=torch.float64)
    even, one = torch.ones(2, 5, 3), torch.zeros(2, 5, 3)
    one[1, 2] = 1
    assert effective_rows([(judge, even, even)]) == pytest.approx(10)
    assert effective_rows([(judge, even, even)] * 3) == pytest.approx(30)
    assert effective_rows([(judge, even, one)]) == pytest.approx(1)
    assert effective_rows([(judge, one, even)]) == pytest.approx(1)
    assert effective_rows([(judge, judge, judge)]) == float("inf")


def test_redrawn_inputs_are_of_the_same_kind() -> None:
    torch.manual_seed(0)
    given = {
        "x": torch.randn(2, 5),
        "ids": torch.arange(10).view(2, 5),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
    }
    one, other = redrawn(given, 1), redrawn(given, 2)
    for made in (one, other):
        assert torch.equal(made["x"].sort().values.flatten().sort().values, given["x"].flatten().sort().values)
        assert torch.equal(made["ids"].sort(-1).values, given["ids"])
        assert torch.equal(made["attention_mask"], given["attention_mask"])
    assert not torch.equal(one["x"], other["x"])
    assert not torch.equal(one["ids"], other["ids"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(one["x"], given["x"])
