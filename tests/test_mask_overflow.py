"""Casts, sums and shifts that wrap around or round keep no formula of what they were made of; padding casts stay padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mask_formulas import disagreement
from mask_programs import inputs
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import subquad
from subquad.passes.recognize import mask_bounds

F = nn.functional
LOW, HIGH = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


class _Some(nn.Module):
    def __init__(self, compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, ids: Tensor, kept: Tensor, given: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in self.compute(ids, torch.arange(ids.shape[1])))


WRAPPING: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "products": lambda x, i: ((x * (1 << 40) * (1 << 20)).int().long() == 0, (x * (1 << 61)) + (x * (1 << 61)) > 3),
    "products, compared": lambda x, i: (x * (1 << 62) >= x + 3, ~(x * (1 << 62) >= i), x * (1 << 62) > i + 3),
    "narrow": lambda x, i: (x.to(torch.int8) > 3, x.to(torch.int16) == 70000, x.to(torch.uint8).long() + 1 > 5),
    "narrow, added": lambda x, i: (x.to(torch.int8) + 100 < 0, x.to(torch.uint8) - 1 > 3, x.to(torch.uint8).neg() > 3),
    "narrow, index": lambda x, i: (i.to(torch.int8) + 120 > 122, (i * 70000).int() > 5, (i.half() * 300) > 2049),
    "half": lambda x, i: (x.half().float() == 65504.0, x.bfloat16().float() == 70144.0, x.bfloat16().double() == -129),
    "half, joined": lambda x, i: ((x.half() + torch.zeros(1, 1)) == 2048.0,),
    "from floats": lambda x, i: ((x.float() * 3e18).long() >= x, (x.float() * 1e12).long() * (1 << 33) > 0),
    "from floats, narrow": lambda x, i: ((x.float() * 1e8).long().int() > 0, (x.float() * 1.5).int() == 10),
    "bits": lambda x, i: (x.float().view(torch.int32) > 0, x.double().view(torch.int64) == 3),
    "shifts": lambda x, i: ((x << 62) + 1 > 0, (x << 31).int() == 0, (1 << x.abs()) + 1 > 1),
    "sums": lambda x, i: ((x * (1 << 30)).cumsum(-1) * (1 << 10) > 5, (x * (1 << 30)).sum(-1, keepdim=True) * 32 > 1),
    "sums, narrow": lambda x, i: (x.cumsum(-1, dtype=torch.int8) > 3, (x * (1 << 29)).cumsum(-1, dtype=torch.int32) > 0),
    "extremes": lambda x, i: (torch.where(x > 0, x, LOW) - 1 > 0, torch.where(x > 0, x, HIGH) + 1 > 0, -x.clamp(max=LOW) > 0),
    "sorted": lambda x, i: ((x * (1 << 33)).sort(-1)[0].int() > 0, x.topk(1).indices * (1 << 40) > 0),
    "not absorbed": lambda x, i: ((x * (1 << 60)).double() + 1e30 == 1e30, (x << 61).double() + 1e30 == 1e30),
}  # fmt: skip


def _traced(name: str) -> torch.fx.GraphModule:
    with torch.no_grad():
        return make_fx(_Some(WRAPPING[name]), tracing_mode="symbolic", pre_dispatch=True)(*inputs(3, 11, 0, True))


@pytest.mark.parametrize("name", WRAPPING)
def test_what_wraps_or_rounds_has_no_formula_of_what_it_was(name: str) -> None:
    assert disagreement(_traced(name))[0] == ""


@pytest.mark.parametrize("name", ["products", "shifts", "sorted", "not absorbed", "extremes"])
def test_without_bounds_the_wrong_formulas_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_bounds.Bounds, "of", lambda self, node: float(1 << 20))
    assert disagreement(_traced(name))[0]


class _Padded(nn.Module):
    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cast = cast

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        seen = self.cast(attention_mask)[:, None, None, :]
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=seen)[:, 0]


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda m: m.to(torch.bool),
    "int32": lambda m: m.to(torch.int32).bool(),
    "int": lambda m: m.int() != 0,
    "int8": lambda m: m.to(torch.int8) == 1,
    "uint8": lambda m: m.to(torch.uint8).bool(),
    "float": lambda m: m.float() > 0,
    "half": lambda m: m.half() > 0.5,
    "bfloat16": lambda m: m.to(torch.bfloat16).bool(),
    "plus": lambda m: m.int() + 1 > 1,
}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *((name, torch.int64) for name in CASTS),
        *(("int32", given) for given in (torch.int32, torch.uint8, torch.float32)),
    ],
)
def test_a_padding_mask_is_one_of_keys_behind_every_cast(name: str, given: torch.dtype) -> None:
    mask = torch.ones(2, 7, dtype=given)
    mask[1, :2] = 0
    report = subquad.inspect(_Padded(CASTS[name]), (torch.randn(2, 7, 4), mask))
    families = [site.mask.family.partition("(")[0] for site in report.sites]
    whole = name in ("bool", "int32", "int", "uint8", "bfloat16")
    assert families == ["padding"] or (not whole and families == ["keys"]), report.refusals
