"""The site rung runs where the original can run: a graph that no default size fits is measured at its example's own size."""

from __future__ import annotations

import pytest
import torch
from spelled_models import HandWrittenDecoder

import subquad
from subquad import site_oracle
from subquad.application import rewritten


def measured(sizes: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch) -> list[site_oracle.Measurement]:
    monkeypatch.setattr(site_oracle, "SIZES", sizes)
    model = HandWrittenDecoder().eval()
    longest = model.blocks[0].attn.seen.shape[-1]
    assert all(length > longest for _, length in sizes) or sizes == ((2, 7), (3, 33))
    fast = subquad.rewrite(model, passes="fuse", example_inputs=(torch.randint(0, 50, (2, 9)),), verify=False)
    record = rewritten(fast)
    assert record is not None
    return site_oracle.site_rungs(record)


def test_sizes_that_no_buffer_reaches_give_way_to_the_examples_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for rung in measured(((2, 1000), (3, 2000)), monkeypatch):
        assert rung.passed
        assert rung.detail.startswith("1 cases")


def test_a_site_that_cannot_be_run_at_all_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_oracle, "_example_size", lambda capture: (2, 3000))
    monkeypatch.setattr(site_oracle, "_example_sizes", lambda capture: {})
    for rung in measured(((2, 1000),), monkeypatch):
        assert not rung.passed
        assert rung.detail.startswith("0 cases")


def test_every_default_size_that_fits_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(int(rung.detail.split()[0]) >= 2 for rung in measured(((2, 7), (3, 33)), monkeypatch))
