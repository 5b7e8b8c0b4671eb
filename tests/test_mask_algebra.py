"""The mask algebra: random mask programs against their tensors, block verdicts against dense evaluation, printing and reading back."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import subquad
from subquad.ir.mask import KV, B, FloorDiv, Mask, Q, Where
from subquad.kernels.evaluation import evaluate
from subquad.passes.recognize.constant_tensor import read_constant
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.mask_choice import choose
from subquad.passes.recognize.mask_relation import negate, relate
from subquad.passes.recognize.symbolic_tensor import as_condition, axis, visible

Condition = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _leaf(kind: str, n: int) -> Condition:
    leaves: dict[str, Condition] = {
        "causal": lambda q, k: k <= q + n,
        "window": lambda q, k: q - k < n + 1,
        "symmetric": lambda q, k: (q - k).abs() <= n + 1,
        "chunk": lambda q, k: q // (n + 1) == k // (n + 1),
        "prefix": lambda q, k: k < n,
        "stride": lambda q, k: (q - k) % (n + 1) == 0,
        "row": lambda q, k: (q >= n) & (k == k),
    }
    return leaves[kind]


conditions = st.recursive(
    st.builds(
        _leaf, st.sampled_from(["causal", "window", "symmetric", "chunk", "prefix", "stride", "row"]), st.integers(0, 4)
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, b: lambda q, k: a(q, k) & b(q, k), inner, inner),
        st.builds(lambda a, b: lambda q, k: a(q, k) | b(q, k), inner, inner),
        st.builds(lambda a: lambda q, k: ~a(q, k), inner),
    ),
    max_leaves=4,
)


class _Masked(nn.Module):
    def __init__(self, condition: Condition, form: str) -> None:
        super().__init__()
        self.condition, self.form = condition, form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None, :]
        seen = self.condition(q, k) | (q == k)
        if self.form == "sdpa":
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)
        scores = x @ x.transpose(1, 2)
        if self.form == "add":
            scores = scores + torch.zeros(x.shape[1], x.shape[1]).masked_fill(~seen, torch.finfo(x.dtype).min)
        else:
            scores = scores.masked_fill(~seen, float("-inf"))
        return torch.softmax(scores, -1) @ x


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(conditions, st.sampled_from(["sdpa", "add", "fill"]))
def test_a_random_mask_program_equals_its_predicate_at_every_element(condition: Condition, form: str) -> None:
    report = subquad.inspect(_Masked(condition, form), (torch.randn(2, 9, 4),))
    assert [site.mask.is_opaque for site in report.sites] == [False], report.refusals
    mask = report.sites[0].mask
    for length in (1, 6, 17):
        q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
        want = (condition(q, k) | (q == k)).expand(length, length)
        text = mask.text()
        got = (
            torch.ones_like(want)
            if text is None
            else torch.as_tensor(evaluate(text, {"q": q, "kv": k})).expand_as(want)
        )
        assert torch.equal(got.bool(), want), mask.family


predicates = st.sampled_from(
    [
        sympy.Le(KV, Q), sympy.Le(KV, Q) & (KV > Q - 3), sympy.Eq(FloorDiv(Q, 4), FloorDiv(KV, 4)), sympy.Abs(Q - KV) <= 2,
        (KV < 3) | sympy.Le(KV, Q), sympy.Not(KV <= Q), sympy.Ne(sympy.Mod(Q, 2), 0), sympy.true,
    ]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(predicates, st.integers(0, 12), st.integers(0, 6), st.integers(0, 12), st.integers(0, 6))
def test_block_verdicts_are_sound(predicate: sympy.Basic, q0: int, dq: int, k0: int, dk: int) -> None:
    mask = Mask(predicate)
    q, k = torch.arange(q0, q0 + dq + 1)[:, None], torch.arange(k0, k0 + dk + 1)[None, :]
    text = mask.text()
    dense = torch.ones(dq + 1, dk + 1, dtype=torch.bool)
    if text is not None:
        dense = torch.as_tensor(evaluate(text, {"q": q, "kv": k})).bool().expand(dq + 1, dk + 1)
    verdict = mask.block((q0, q0 + dq), (k0, k0 + dk))
    if verdict != "partial":
        assert bool(dense.all() if verdict == "full" else not dense.any())


def test_causal_blocks_are_decided_exactly() -> None:
    mask = Mask(sympy.Le(KV, Q))
    assert mask.block((8, 15), (0, 7)) == "full"
    assert mask.block((0, 7), (8, 15)) == "empty"
    assert mask.block((0, 7), (0, 7)) == "partial"


@pytest.mark.parametrize(
    ("predicate", "family"),
    [
        (sympy.Le(KV, Q), "causal"),
        (sympy.Ge(Q, KV), "causal"),
        (sympy.Lt(KV, Q + 1), "causal"),
        (sympy.Le(KV, Q + 3), "causal(3)"),
        (sympy.And(sympy.Le(KV, Q), sympy.Gt(KV, Q - 8)), "causal & window(8)"),
        (sympy.Ne(sympy.Function("pad", integer=True)(B, KV), 0), "padding(pad)"),
        (
            sympy.Eq(sympy.Function("doc", integer=True)(B, Q), sympy.Function("doc", integer=True)(B, KV)),
            "documents(doc)",
        ),
        (sympy.true, "full"),
    ],
)
def test_families_have_the_names_of_the_field(predicate: sympy.Basic, family: str) -> None:
    assert Mask(predicate).family == family


def test_additive_masks_are_read_only_when_they_hide_completely() -> None:
    causal = sympy.Le(KV, Q)
    assert visible(Where(causal, sympy.S.Zero, -sympy.oo)) == (causal, True)
    assert visible(Where(causal, sympy.S.Zero, sympy.Float(-3.4e38))) == (causal, False)
    assert visible(Where(causal, sympy.S.Zero, sympy.Integer(-10000))) is None
    assert visible(Where(causal, sympy.Integer(1), -sympy.oo)) is None


def test_a_choice_of_numbers_as_a_condition_is_what_chooses() -> None:
    causal = sympy.Le(KV, Q)
    assert as_condition(choose(causal, sympy.S.One, sympy.S.Zero)) == causal
    assert as_condition(choose(causal, sympy.S.Zero, sympy.S.One)) == negate(causal)


def test_equal_conditions_are_equal_expressions() -> None:
    spellings = [
        relate("le", KV, Q), relate("ge", Q, KV), relate("lt", KV, Q + 1), relate("gt", Q - KV, sympy.Integer(-1)),
        negate(relate("gt", KV, Q)), relate("ge", Q - KV, sympy.S.Zero), relate("le", KV - Q, sympy.Float(0.5)),
    ]  # fmt: skip
    assert len(set(spellings)) == 1


class _Attention(nn.Module):
    """softmax(scores + what a function makes of the sizes and the inputs)."""

    def __init__(self, mask: Callable[..., torch.Tensor], form: str) -> None:
        super().__init__()
        self.mask, self.form = mask, form
        self.register_buffer("band", torch.ones(64, 64, dtype=torch.bool).tril().triu(-3), persistent=False)
        self.register_buffer("blocks", torch.block_diag(*[torch.ones(4, 4)] * 16).bool(), persistent=False)

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        mask = self.mask(self, x.shape[1], *more)
        if self.form == "sdpa":
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return torch.softmax(x @ x.mT + mask, -1) @ x


def _triangle(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _low(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("mask", "form", "more", "family", "biases"),
    [
        (lambda m, n: m.band[:n, :n], "sdpa", (), "causal & window(4)", 0),
        (lambda m, n: m.blocks[:n, :n] & _triangle(n), "sdpa", (), "causal & chunk(4)", 0),
        (lambda m, n, given: given & _triangle(n), "sdpa", (torch.rand(9, 9) < 0.5,), "causal", 1),
        (lambda m, n, given: _low(given & _triangle(n)), "add", (torch.rand(9, 9) < 0.5,), "opaque", 1),
        (lambda m, n, used: torch.arange(n) <= torch.arange(n)[:, None] + used, "sdpa", (torch.tensor(2),), "causal(more_0)", 0),
        (lambda m, n: torch.triu(torch.full((n, n), -1e4), 1), "add", (), "full", 1),
        (lambda m, n: torch.triu(torch.full((n, n), -65504.0), 1).half(), "add", (), "full", 1),
    ],
)  # fmt: skip
def test_what_is_proved_becomes_the_predicate_and_the_rest_stays_a_tensor(
    mask: Callable[..., torch.Tensor], form: str, more: tuple[torch.Tensor, ...], family: str, biases: int
) -> None:
    (site,) = subquad.inspect(_Attention(mask, form), (torch.randn(2, 9, 4), *more)).sites
    assert (site.mask.family, len(site.biases)) == (family, biases)
    assert not any("not cross-checked" in sentence for sentence in site.mask.evidence)


def test_a_tensor_that_is_written_to_is_never_read_as_what_it_was() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(x.shape[1], x.shape[1])
        row = seen[0]
        row.fill_(0)
        return seen + 1

    module = make_fx(forward, tracing_mode="symbolic", pre_dispatch=True)(torch.randn(2, 9, 4))
    algebra = MaskAlgebra(module)
    tensors = [n for n in module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert not [n.name for n in tensors if algebra.formula(n).expression.is_number]
    assert {"ones", "select", "fill_"} <= set(algebra.tables)


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        (torch.arange(6) * 3 - 1, True),
        (torch.tensor([0, 5, 2]), True),
        ((torch.arange(12)[:, None] - torch.arange(12)) % 3 == 0, True),
        (torch.ones(8, 8).tril() + (torch.arange(8) < 3) > 0, True),
        (torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]]), True),
        (torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]), False),
        (torch.rand(4, 4), False),
    ],
)
def test_a_stored_tensor_is_a_formula_only_when_it_equals_it(source: torch.Tensor, kept: bool) -> None:
    formula = read_constant(source)
    assert (formula is not None) == kept
    if formula is not None:
        for place in itertools.product(*(range(size) for size in source.shape)):
            value = formula.xreplace({axis(n): sympy.Integer(index) for n, index in enumerate(place)})
            assert float(source[place]) == float(value == sympy.true if value in (sympy.true, sympy.false) else value)
