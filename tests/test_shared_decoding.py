"""Rows that share prefixes: stored once, computed once, and to the last bit of float64 what each row gives alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from spelled_models import HandWrittenDecoder, sharp_llama, tiny_llama
from test_decoder_verify import LOLCATS, check_tree, sliding
from torch import Tensor

import subquad
from subquad.application import original_forward
from subquad.incremental import Decoder, decoder
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError
from subquad.runtime import sharing_plan, tree_stepper
from subquad.runtime.decode_engine import executor
from subquad.runtime.key_tree import separate
from subquad.runtime.prefix_tree import find_sharing
from subquad.runtime.shared_prompt import run_shared
from subquad.runtime.sharing_plan import SharingPlan, plan_sharing
from subquad.runtime.tree_stepper import TreeStepper

EXACT = 1e-10
KINDS = ("llama", "own", "sliding", "recurrent")


@functools.cache
def made(kind: str) -> Decoder:
    torch.manual_seed(0)
    build: Any = {"own": lambda: HandWrittenDecoder().eval(), "sliding": sliding}.get(kind, lambda: tiny_llama(2))
    inputs = (torch.zeros(2, 5, dtype=torch.int64),) if kind == "own" else None
    passes = LOLCATS if kind == "recurrent" else "fuse"
    return decoder(subquad.rewrite(build().double(), passes=passes, example_inputs=inputs, verify=False))


def alone(one: Decoder, tokens: list[int]) -> Tensor:
    """Logits [T, V] of a row by itself."""
    return one.prefill(torch.tensor([tokens]), last_only=False)[0][0]


def padded(rows: list[list[int]], left: bool = True) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for n, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[n, at], mask[n, at] = torch.tensor(row), 1
    return ids, mask


@pytest.fixture
def eager_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prefix is worth sharing, however short."""
    for name, value in (("PASS", 0), ("LEAST", 1), ("GAIN", 2.0)):
        monkeypatch.setattr(sharing_plan, name, value)


def follow(one: Decoder, rows: list[list[int]], left: bool = True, steps: int = 3) -> SharingPlan:
    """Prefill and steps of a batch, every logit against rows run alone."""
    seen: list[SharingPlan] = []
    taken = TreeStepper(one.engine, 40, on_sharing=seen.append)
    if plan_sharing(*padded(rows, left)).sharing is None:
        return plan_sharing(*padded(rows, left))
    got = taken.prefill(*padded(rows, left))
    rows = [list(row) for row in rows]
    for n, row in enumerate(rows):
        assert (got[n] - alone(one, row)[-1]).abs().max() < EXACT
    for step in range(steps):
        trees = [DraftTree.chain((3 + (7 * n + step) % 40,)) if (n + step) % 4 else None for n in range(len(rows))]
        trees = [DraftTree((5,), (-1,)) if all(t is None for t in trees) else t for t in trees]
        logits = taken.verify(trees)
        for n, tree in enumerate(trees):
            if tree is not None:
                rows[n] += tree.tokens
                assert (logits[n][-1] - alone(one, rows[n])[-1]).abs().max() < EXACT
        taken.commit([() if tree is None else (0,) for tree in trees])
    return seen[0]


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    """Rows that grow from each other, ragged, in random order, identical ones among them."""
    token = st.integers(3, 8)
    rows = [draw(st.lists(token, min_size=1, max_size=7))]
    for _ in range(draw(st.integers(1, 5))):
        stem = draw(st.sampled_from(rows))
        grown = stem[: draw(st.integers(0, len(stem)))] + draw(st.lists(token, max_size=6))
        rows.append(grown or [3])
    return draw(st.permutations(rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("eager_plans")
def test_rows_of_any_tree_equal_rows_alone(kind: str) -> None:
    one = made(kind)

    @settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(families(), st.booleans())
    def check(rows: list[list[int]], left: bool) -> None:
        follow(one, rows, left)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("eager_plans")
def test_two_levels_are_stored_once(kind: str) -> None:
    one = made(kind)
    root = [5 + n % 30 for n in range(11)]
    middles = [[3, 4, 5, 6], [9, 8, 7, 9]]
    rows = [root + middles[n % 2] + [10 + n, 11, 12 + n] for n in (0, 1, 2, 3, 4)]
    plan = follow(one, rows)
    assert plan.sharing is not None
    assert [level.lengths for level in plan.sharing.levels] == [(11,), (4, 4)]
    assert plan.saved == 4 * 11 + (2 + 1) * 4
    assert plan.computed == 11 + 4 + 4 + 5 * 3
    sharing = find_sharing(*padded(rows), least=1)
    _, state, _ = run_shared(one.engine, *padded(rows), sharing, 4)
    bytes_of_rows = sum(t.numel() * t.element_size() for site in state.recurrence.sites for t in site)
    assert state.bytes() - bytes_of_rows == plan.computed * one.engine.layout.token_bytes
    if state.pools:
        assert state.pools[0].shape[2] < 11 + 16  # own slots only
        assert sum(t.shape[0] for t in state.shared.k[:1]) == 19


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("eager_plans")
def test_what_is_compiled_for_few_tokens_serves_rows_with_and_without_shared_keys(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(kind)
    monkeypatch.setitem(one.engine.compiled, "few", executor(one.programs.schedules["few"], one.weights))
    monkeypatch.delitem(one.engine.eager, "joined")
    root = [5 + n % 30 for n in range(11)]
    middles = [[3, 4, 5, 6], [9, 8, 7, 9]]
    rows = [root + middles[n % 2] + [10 + n, 11, 12 + n][: 1 + n % 3] for n in range(4)] + [[40, 41], [*root, 30]]
    plan = follow(one, rows)
    assert plan.once
    assert plan.sharing is not None
    assert sorted(plan.sharing.shared.tolist()) == [0, 11, 15, 15, 15, 15]
    if one.trees:
        sharing = find_sharing(*padded(rows), least=1)
        _, state, _ = run_shared(one.engine, *padded(rows), sharing, 40)
        check_tree(one, [list(rows[row]) for row in sharing.order], [0] * 6, state, 3)
    plain = [row[-6:] for row in rows[:4]] if kind == "own" else rows
    state = one.prefill(*padded(plain)[: 1 if kind == "own" else 2])[1]
    got = one.step(torch.full((len(plain), 1), 9), state)
    one.rollback(state, 1)
    monkeypatch.delitem(one.engine.compiled, "few")
    assert (one.step(torch.full((len(plain), 1), 9), state) - got).abs().max() < EXACT


@pytest.mark.parametrize("kind", ["llama", "own", "sliding"])
def test_trees_select_and_separate_behind_shared_rows(kind: str) -> None:
    one = made(kind)
    root = [5 + (3 * n) % 29 for n in range(9)]
    rows = [root + [3 + n, 4, 7][: 1 + n % 3] for n in range(4)]
    sharing = find_sharing(*padded(rows), least=1)
    _, state, _ = run_shared(one.engine, *padded(rows), sharing, 40)
    rows = [rows[row] for row in sharing.order]
    for seed in range(3):
        check_tree(one, rows, [0] * 4, state, seed)
    chosen = one.select(state, [2, 0, 2, 1])
    check_tree(one, [list(rows[n]) for n in (2, 0, 2, 1)], [0] * 4, chosen, 7)
    apart = separate(one.engine.layout, state, 30)
    assert apart.shared is None
    check_tree(one, [list(row) for row in rows], [0] * 4, apart, 8)
    check_tree(one, rows, [0] * 4, state, 9)
    with pytest.raises(GenerationError, match="shared with other rows"):
        one.rollback(state, [0, 0, 0, len(rows[3])])
    one.rollback(state, [len(row) - 9 for row in rows])
    check_tree(one, [list(row[:9]) for row in rows], [0] * 4, state, 10)


def test_recurrent_states_go_back_as_far_as_the_prefix() -> None:
    one = made("recurrent")
    rows = [[5 + n % 30 for n in range(9)] + [20 + n] for n in range(3)]
    _, state, _ = run_shared(one.engine, *padded(rows), find_sharing(*padded(rows), least=1), 40)
    for step in range(8):
        one.step(torch.tensor([[3 + step], [4], [5]]), state)
    one.rollback(state, 9)
    got = one.step(torch.tensor([[7, 8]]).expand(3, 2), state)
    want = alone(one, [*rows[0][:9], 7, 8])[-2:]
    assert (got - want).abs().max() < EXACT


def test_a_prefix_longer_than_the_window_leaves_no_trace_outside_it() -> None:
    one = made("sliding")
    rows = [[3 + (5 * n) % 37 for n in range(40)] + [4 + n] * 6 for n in range(3)]
    _, state, _ = run_shared(one.engine, *padded(rows), find_sharing(*padded(rows), least=1), 8)
    for n, row in enumerate(sorted(rows)):
        got = one.step(torch.tensor([[9]]).expand(3, 1), one.select(state, [0, 1, 2]))[n, -1]
        assert (got - alone(one, [*row, 9])[-1]).abs().max() < EXACT
    for node in (state.shared.k, state.shared.v):
        for t in node:
            t[:30].fill_(1e4)
    got = one.step(torch.tensor([[9]]).expand(3, 1), state)[0, -1]
    assert (got - alone(one, [*sorted(rows)[0], 9])[-1]).abs().max() < EXACT


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[3, 4, 5]], "one row"),
        ([[3] * 40, [4] * 40], "no two rows have more than 0 leading tokens"),
        ([[3] * 20, []], "row 1 holds no token"),
        ([[3] * 17, [3] * 16 + [4]], "less than the passes that it adds cost"),
    ],
    ids=["one", "different", "empty", "short"],
)
def test_why_nothing_is_shared(rows: list[list[int]], reason: str) -> None:
    plan = plan_sharing(*padded(rows))
    assert plan.sharing is None
    assert plan.saved == 0
    assert plan.why_not is not None
    assert reason in plan.why_not


def test_holes_adapters_and_identical_rows() -> None:
    rows = [[3 + n % 20 for n in range(200)]] * 4
    ids, mask = padded(rows)
    plan = plan_sharing(ids, mask)
    assert plan.saved == 3 * 199  # the last token's logits are wanted of every row
    mask[1, 7] = 0
    assert "hides columns inside a row" in (plan_sharing(ids, mask).why_not or "")
    apart = plan_sharing(ids, None, torch.tensor([0, 1, 0, 1]))
    assert apart.saved == 2 * 199
    assert len(apart.sharing.nodes) == 2
    assert plan_sharing(ids, None, torch.arange(4)).sharing is None


def test_keys_stay_shared_where_that_pays() -> None:
    plan = plan_sharing(torch.arange(500).expand(8, -1))
    assert plan.decided(1, 0).once
    assert not plan.decided(1, 16).once
    assert plan.decided(10**6, 16).once
    assert plan_sharing(torch.arange(500).expand(17, -1)).decided(1, 16).once
    assert not plan_sharing(torch.arange(500)[None]).decided(10**9, 0).once


@pytest.fixture(scope="module")
def fast() -> Any:
    return subquad.rewrite(sharp_llama(2), passes=["fuse", "speculate"], verify=False)


SYSTEM = [5 + (3 * n) % 50 for n in range(70)]


@pytest.mark.parametrize(
    "words", [{}, {"method": "none"}, {"num_return_sequences": 3, "do_sample": True, "method": "none"}], ids=str
)
@pytest.mark.parametrize(
    "tails", [[[7], [8, 9, 9], [3, 3], [60]], [[7, 7], [7, 7], [7, 7]]], ids=["ragged", "identical"]
)
def test_generate_gives_the_original_tokens(fast: Any, tails: list[list[int]], words: dict[str, Any]) -> None:
    ids, mask = padded([SYSTEM + tail for tail in tails])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask, **words}
    torch.manual_seed(1)
    with original_forward(fast):
        want = fast.generate(ids, **{k: v for k, v in options.items() if k != "method"})
    torch.manual_seed(1)
    got = fast.generate(ids, **options)
    assert fast.generate.why_not is None
    assert torch.equal(got, want)
    plan = fast.generate.sharing
    assert plan.sharing is not None
    assert plan.saved >= (plan.rows - 1) * len(SYSTEM)
    torch.manual_seed(1)
    assert torch.equal(fast.generate(ids, share_prefix=False, **options), want)
    assert fast.generate.sharing.why_not == "sharing was turned off"


def test_beams_stay_the_models_own(fast: Any) -> None:
    ids, mask = padded([[*SYSTEM, 7], [*SYSTEM, 9, 4]])
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with original_forward(fast):
        want = fast.generate(ids, **options)
    assert torch.equal(fast.generate(ids, **options), want)
    assert "num_beams" in fast.generate.why_not
    assert fast.generate.sharing is None


def test_a_batch_that_shares_nothing_runs_as_before(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_stepper, "run_shared", None)
    ids = torch.randint(3, 60, (3, 30), generator=torch.Generator().manual_seed(0))
    fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert "leading tokens in common" in fast.generate.sharing.why_not


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_answers_are_scored_as_alone(kind: str, left: bool) -> None:
    one = made(kind)
    questions = [[5 + (3 * n) % 29 for n in range(50)], [7 + (5 * n) % 23 for n in range(44)]]
    answers = [[9], [9, 8, 3], [4, 4], [9, 8, 7, 6]]
    rows = [question + answer for question in questions for answer in answers] + [[3, 4]]
    start = [len(question) for question in questions for _ in answers] + [1]
    seen: list[SharingPlan] = []
    found = one.score(*padded(rows, left), start=start, on_sharing=seen.append)
    for row, first, scores in zip(rows, start, found, strict=True):
        want = alone(one, row).log_softmax(-1)[first - 1 : -1].gather(1, torch.tensor(row[first:])[:, None])[:, 0]
        assert (scores - want).abs().max() < EXACT
    assert seen[0].sharing is not None
    assert seen[0].computed <= 49 + 43 + 8 + 20 + 2
    plain = one.score(*padded(rows, left), start=start, share=False)
    assert all((a - b).abs().max() < EXACT for a, b in zip(found, plain, strict=True))
    for wrong in (0, 51):
        with pytest.raises(GenerationError, match="cannot be scored from column"):
            one.score(*padded(rows, left), start=[wrong, *start[1:]])
    ids, mask = padded(rows, left)
    mask[0, mask[0].nonzero()[4]] = 0
    with pytest.raises(GenerationError, match="hidden columns inside row 0"):
        one.score(ids, mask, start=[2, *start[1:]])
