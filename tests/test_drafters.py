"""Drafters: their data structures against brute force, and token identity of each under the engine."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_model import random_model
from test_speculation import KNOBS, run

from subquad.ir.draft import DraftTree
from subquad.ir.errors import PassError
from subquad.kernels.largest import first_largest, top_tokens
from subquad.passes.speculate.prompt_lookup import PromptLookup
from subquad.passes.speculate.ranked_tree import grow, learn, prior
from subquad.passes.speculate.rates import Rates
from subquad.passes.speculate.speculative_sampling import SpeculativeSampling
from subquad.passes.speculate.suffix_automaton import SuffixAutomaton, SuffixMatch
from subquad.passes.speculate.token_recycling import TokenRecycling
from subquad.passes.speculate.trigram_tree import TrigramTree
from subquad.passes.speculate.union import Union, merge

DRAFTERS = {
    "prompt lookup": PromptLookup,
    "suffix automaton": SuffixMatch,
    "token recycling": lambda: TokenRecycling(width=3),
    "trigram tree": TrigramTree,
    "union": lambda: Union((SuffixMatch(), TokenRecycling(width=3))),
    "union of four": lambda: Union((SuffixMatch(), TokenRecycling(width=3), PromptLookup(), TrigramTree())),
}


@pytest.mark.parametrize("trees", [True, False], ids=["tree", "chain"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_keeps_the_tokens(name: str, trees: bool) -> None:
    """Batches of 1 and 4, penalties and sampling, stops; one drafter learns through all of them."""
    drafter = DRAFTERS[name]()
    forward = random_model(3, memory=2)
    four = torch.tensor([[0, 0, 4, 2], [1, 2, 3, 4], [0, 5, 5, 5], [6, 1, 6, 1]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    stop = lambda row, prefix, scores: prefix[0, -2:].tolist() == [1, 6]  # noqa: E731
    for ids, keep in ((four[1:2], None), (four, mask)):
        for knobs, ends, stops in itertools.product(KNOBS if ids is not four else KNOBS[:4], ((), (5,)), ((), (stop,))):
            options = {"ids": ids, "mask": keep, "knobs": knobs, "ends": ends, "stops": stops, "count": 24}
            assert run(forward, drafter, trees=trees, **options)[0] == run(forward, **options)[0]


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_are_accepted_where_the_text_repeats_itself(name: str) -> None:
    drafter = DRAFTERS[name]()
    forward = random_model(11, memory=1)
    for _ in range(2):
        rows, stepper = run(forward, drafter, count=60)
    assert len(rows[0]) / stepper.passes > 2.5


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=50))
def test_the_automaton_knows_the_longest_suffix_that_also_ends_earlier(tokens: list[int]) -> None:
    automaton = SuffixAutomaton()
    for n, token in enumerate(tokens):
        automaton.add(token)
        now = tokens[: n + 1]
        lengths = [k for k in range(1, n + 1) if any(now[i : i + k] == now[n + 1 - k :] for i in range(n + 1 - k))]
        assert automaton.matched == max(lengths, default=0)
        if lengths:
            behind, k = automaton.continuation, automaton.matched
            assert behind <= n
            assert now[behind - k : behind] == now[n + 1 - k :]
    assert len(automaton.next) <= 2 * len(tokens) + 1


def test_the_automaton_prefers_what_was_seen_last() -> None:
    automaton = SuffixAutomaton()
    for token in (1, 2, 7, 1, 2, 8, 1, 2):
        automaton.add(token)
    assert automaton.tokens[automaton.continuation] == 8


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 2000), st.integers(1, 9), st.integers(0, 99))
def test_top_tokens_are_those_of_topk(rows: int, vocabulary: int, count: int, seed: int) -> None:
    logits = (
        torch.randperm(rows * vocabulary, generator=torch.Generator().manual_seed(seed)).view(rows, vocabulary).float()
    )
    want = logits.topk(min(count, vocabulary), -1).indices
    assert torch.equal(top_tokens(logits, count), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [-100.0, -3.0, 0.0, 3.0])
def test_top_tokens_of_any_sign_and_dtype(form: str, dtype: torch.dtype, shift: float) -> None:
    """At -100 no logit is positive, at -3 fewer than asked for in some rows."""
    logits = (torch.randn(5, 4000, generator=torch.Generator().manual_seed(0)) + shift).to(dtype)
    logits[0, :3993] = -torch.inf
    logits[1, 7] = torch.inf
    found = top_tokens(logits, 8)
    assert torch.equal(logits.gather(1, found), logits.topk(8, -1).values)
    assert all(len(set(row)) == 8 for row in found.tolist())
    assert torch.equal(top_tokens(logits[:0], 8), logits[:0].topk(8, -1).indices)
    assert torch.equal(logits.gather(1, top_tokens(logits, 4000)), logits.sort(-1, descending=True).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 4000])
def test_the_first_of_the_largest_is_that_of_argmax(form: str, dtype: torch.dtype, vocabulary: int) -> None:
    """Few different values, both zeros among them, so that most of the largest are not alone."""
    source = torch.Generator().manual_seed(vocabulary)
    for _ in range(20):
        scores = torch.randint(-3, 2, (3, vocabulary), generator=source).div(2).to(dtype)
        scores[0] *= -0.0
        for row in scores.split(1):
            assert first_largest(row) == int(row.argmax())


@pytest.mark.parametrize("form", ["native"], indirect=True)
def test_equal_logits_come_in_ascending_order(form: str) -> None:
    assert top_tokens(torch.zeros(5, 40_000), 4).tolist() == [[0, 1, 2, 3]] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [0x7FC0, -0x0040])
def test_a_nan_of_either_sign_is_seen(form: str, dtype: torch.dtype, bits: int) -> None:
    scores = torch.randn(1, 1000).to(dtype)
    scores[0, 700] = torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16)[0].to(dtype)
    assert first_largest(scores) is None
    assert first_largest(torch.full((1, 9), -torch.inf, dtype=dtype)) == 0


def test_the_grown_tree_has_the_paths_of_highest_value() -> None:
    source = random.Random(0)
    rates = Rates(prior)
    for key in itertools.product(range(1, 4), range(3)):
        for _ in range(50):
            rates.add(key, source.random() < 0.8 / (1 + key[1]) / key[0])
    ranked = {0: [1, 2, 3], 1: [2, 0], 2: [3], 3: []}
    values = {}

    def every(path: tuple[int, ...], value: float) -> None:
        most = 1.0
        for rank, token in enumerate(ranked[path[-1]] if len(path) < 4 else []):
            most = values[(*path, token)] = min(most, value * rates.rate((len(path), rank)))
            every((*path, token), most)

    every((0,), 1.0)
    tree = grow((0,), lambda path: ranked[path[-1]], rates, 5, 3)
    best = sorted(values.values(), reverse=True)[:5]
    assert tree.values[1:] == pytest.approx(best)
    assert all(tree.parents[n] < n for n in range(len(tree)))
    before = rates.rate((1, 1))
    learn(tree, [2, 3], rates)
    assert rates.rate((1, 1)) > before


def test_merged_trees_hold_the_likeliest_paths_once() -> None:
    one = DraftTree.chain((9, 1, 2, 3), (1.0, 0.9, 0.8, 0.1))
    other = DraftTree((9, 1, 4, 5), (-1, 0, 0, 1), (1.0, 0.5, 0.3, 0.2))
    tree = merge([one, other], 4)
    paths = {tuple(tree.tokens[n] for n in path) for path in ([1], [1, 2], [3])}
    assert (tree.tokens, tree.parents) == ((9, 1, 2, 4, 5), (-1, 0, 1, 0, 1))
    assert tree.values == (1.0, 0.9, 0.8, 0.3, 0.2)
    assert paths == {(1,), (1, 2), (4,)}
    assert len(merge([one, other], 50)) == 6


def test_drafts_that_are_drawn_are_not_united() -> None:
    class DrawnDrafter(PromptLookup):
        pass

    with pytest.raises(PassError, match="DrawnDrafter draws its drafts at random"):
        Union((DrawnDrafter(acceptance=SpeculativeSampling()),))


def test_recycling_keeps_its_matrix_and_proposes_no_unknown_token() -> None:
    drafter = TokenRecycling(width=3)
    forward = random_model(4, memory=1)
    run(forward, drafter, count=20)
    seen = [token for token in range(8) if drafter.successors.of(token)]
    assert seen
    for token in seen:
        assert drafter.successors.of(token) == forward((token,)).topk(3).indices.tolist()
    assert drafter.successors.of(100) == []


def test_a_corpus_fills_the_trigrams() -> None:
    drafter = TrigramTree()
    drafter.read([1, 2, 3, 1, 2, 3, 1, 2, 4])
    assert drafter.ranked((1, 2)) == [3, 4]
    for _ in range(40):
        drafter.reinforce([1, 2, 4])
    assert drafter.ranked((1, 2)) == [4, 3]
    assert drafter.table[1, 2][4] < drafter.most
