"""Hooks on a rewritten model run once, whichever module the rewrite is bound to."""

from __future__ import annotations

import pytest
import torch
from spelled_models import ScoredAttention
from torch import nn

import subquad

X = (torch.randn(2, 9, 16),)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ScoredAttention(lambda s: s)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


@pytest.mark.parametrize(("owner", "hooked"), [("", ""), ("inner", ""), ("inner", "inner")])
def test_hooks_run_once_and_are_counted_once(owner: str, hooked: str) -> None:
    model = (Doubled() if owner else ScoredAttention(lambda s: s)).eval()
    calls: list[str] = []
    target = model.get_submodule(hooked)
    target.register_forward_pre_hook(lambda m, a: (calls.append("before"), (a[0] + 1,))[1])
    target.register_forward_hook(lambda m, a, y: (calls.append("after"), y * 3)[1])
    want = model(*X)
    fast = subquad.rewrite(model, passes="fuse", example_inputs=X)
    assert len(fast.report.applied) == 1
    assert not fast.report.rolled_back
    calls.clear()
    torch.testing.assert_close(fast(*X), want)
    assert calls == ["before", "after"]
    assert any("hooks of the whole model" in note for note in fast.report.notes) == (not hooked)
