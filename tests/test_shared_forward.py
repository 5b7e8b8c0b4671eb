"""Batched calls of a language model's forward whose rows begin alike: shared, exact, and the original call in everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spelled_models import tiny_llama
from torch import Tensor

import subquad
from subquad.application import original_forward
from subquad.runtime import sharing_plan

VOCABULARY = 60


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return subquad.rewrite(tiny_llama(2, "sdpa").double(), passes=["fuse", "share_prefix"], verify=False)


@pytest.fixture(autouse=True)
def eager_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prefix is worth sharing, however short."""
    for name, value in (("PASS", 0), ("LEAST", 1), ("GAIN", 2.0)):
        monkeypatch.setattr(sharing_plan, name, value)


def batch(prefix: int, own: list[int], left: bool = False, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids, mask) of rows that share `prefix` tokens and have own[n] of their own, padded to one length."""
    shared, width = torch.randint(1, VOCABULARY, (prefix,)), prefix + max(own)
    ids, mask = torch.zeros(len(own), width, dtype=torch.int64), torch.zeros(len(own), width, dtype=torch.int64)
    for n, count in enumerate(own):
        row = torch.cat([shared, torch.randint(1, VOCABULARY, (count,))])
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[n, at], mask[n, at] = row, 1
    return ids, mask


def check(model: Any, ids: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """The call against the original's, over real columns; returns its output."""
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, **more)
        plan = model.forward.sharing
        with original_forward(model):
            want = model(input_ids=ids, attention_mask=mask, **more).logits
    logits = found.logits
    assert logits.shape == want.shape
    assert logits.dtype == want.dtype
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    near = (
        1e-9 if bool(real[:, 0].all()) else 1e-6
    )  # angles of positions are float32 in the original, whatever the model's
    torch.testing.assert_close(logits[:, -1][real[:, -1]], want[:, -1][real[:, -1]], rtol=near, atol=near)
    torch.testing.assert_close((logits + 0)[real], want[real], rtol=near, atol=near)
    return plan


def test_the_report_says_that_calls_share(model: Any) -> None:
    (entry,) = [one for one in model.report.applied if one["path"] == "forward"]
    assert entry["contract"] == "exact"
    assert "what they have in common runs once" in entry["what"]
    assert model.report.refused == []


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("own", [[3, 3, 3], [1, 4, 2], [5, 1]], ids=str)
def test_logits_of_all_columns(model: Any, own: list[int], left: bool) -> None:
    torch.manual_seed(1)
    ids, mask = batch(7, own, left)
    plan = check(model, ids, mask)
    assert plan.sharing is not None
    assert plan.saved >= 7 * (len(own) - 1)


def test_groups_of_answers_to_two_questions(model: Any) -> None:
    torch.manual_seed(2)
    one, two = batch(9, [2, 3, 1]), batch(6, [6, 5])
    ids, mask = (torch.cat(pair)[torch.tensor([0, 3, 1, 4, 2])] for pair in zip(one, two, strict=True))
    plan = check(model, ids, mask)
    assert len(plan.sharing.nodes) >= 2


def test_identical_rows_and_no_mask(model: Any) -> None:
    ids = torch.randint(1, VOCABULARY, (1, 8)).expand(4, -1).contiguous()
    plan = check(model, ids, None)
    assert plan.saved == 3 * 7


def test_rows_that_share_nothing_run_as_they_were(model: Any) -> None:
    ids = torch.arange(24).view(3, 8) + 1
    plan = check(model, ids, None)
    assert plan.sharing is None
    assert "no two rows have more than 0 leading tokens" in plan.why_not


@pytest.mark.parametrize(
    ("more", "why"),
    [({"output_hidden_states": True}, "gives output_hidden_states"), ({"labels": "ids"}, "gives labels"),
     ({"position_ids": "places"}, "gives position_ids")],
)  # fmt: skip
def test_other_calls_are_the_original_ones(model: Any, more: dict[str, Any], why: str) -> None:
    ids, mask = batch(6, [2, 2])
    values = {"ids": ids, "places": torch.arange(8).expand(2, -1)}
    given = {name: values.get(value, value) if isinstance(value, str) else value for name, value in more.items()}
    plan = check(model, ids, mask, **given)
    assert why in plan.why_not
    assert plan.sharing is None


def test_gradients_and_training_are_the_original_ones(model: Any) -> None:
    ids, mask = batch(6, [2, 2])
    found = model(input_ids=ids, attention_mask=mask)
    assert "gradients are recorded" in model.forward.sharing.why_not
    assert found.logits.requires_grad


def test_a_mask_with_holes_is_not_shared(model: Any) -> None:
    ids, mask = batch(6, [2, 2])
    mask[0, 3] = 0
    plan = check(model, ids, mask)
    assert "hides columns inside a row" in plan.why_not


def test_the_cache_that_is_handed_back_is_the_models(model: Any) -> None:
    ids, mask = batch(6, [2, 2])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, use_cache=True)
        assert model.forward.sharing.sharing is not None
        assert found.past_key_values.get_seq_length() == 8
        following = torch.randint(1, VOCABULARY, (2, 1))
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        step = model(input_ids=following, attention_mask=more, past_key_values=found.past_key_values).logits
        with original_forward(model):
            want = model(input_ids=torch.cat([ids, following], 1), attention_mask=more).logits[:, -1:]
    torch.testing.assert_close(step, want, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=mask, use_cache=False).past_key_values is None


def test_a_model_with_a_table_of_positions_keeps_rows_padded_on_the_left() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    model = GPT2LMHeadModel(config).double().eval()
    subquad.rewrite(model, passes="share_prefix", verify=False)
    left = check(model, *batch(6, [2, 4], left=True))
    assert "positions count padding" in left.why_not
    assert check(model, *batch(6, [2, 4])).sharing is not None


def test_restoring_takes_the_sharing_away() -> None:
    torch.manual_seed(0)
    model = subquad.rewrite(tiny_llama(1, "sdpa"), passes="share_prefix", verify=False)
    assert hasattr(model.forward, "sharing")
    subquad.restore(model)
    assert "forward" not in model.__dict__
