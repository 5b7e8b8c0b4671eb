"""The model drafts for itself with blocks left out: its tokens stay, its state too, and the search finds blocks it can spare."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from spelled_models import tiny_llama
from test_speculation import KNOBS

import subquad
from subquad.decoder import Decoder
from subquad.incremental import decoder
from subquad.ir.decoding import Choice
from subquad.passes.speculate.layer_skip import ENOUGH, WINDOW, LayerSkip, Search
from subquad.runtime.chance import seeded
from subquad.runtime.pacing import FixedPacing
from subquad.runtime.processors import processors
from subquad.runtime.speculation import Ending

IDS = torch.tensor([[0, 0, 0, 5, 9, 5, 9], [3, 4, 3, 4, 3, 4, 3], [0, 8, 8, 8, 8, 8, 8]])


@pytest.fixture(scope="module")
def made() -> Decoder:
    torch.manual_seed(0)
    model = tiny_llama(4)
    with torch.no_grad():  # sharp laws, so that a shortened model is sure of some of its tokens
        model.lm_head.weight.mul_(20)
    return decoder(subquad.rewrite(model, passes="fuse", verify=False))


def tokens(
    made: Decoder, ids: torch.Tensor, drafter: LayerSkip | None, knobs: dict[str, Any], seed: int = 0
) -> tuple[Any, int]:
    choice = Choice(processors(**knobs), knobs.get("temperature", 0.0) == 0, seeded(seed, torch.device("cpu")))
    rows: list[list[int]] = [[] for _ in ids]
    passes = 0
    for one in made.decode(
        ids, (ids != 0).long(), choice=choice, ending=Ending(20, {63}), drafter=drafter, pacing=FixedPacing(4)
    ):
        passes += 1
        for row, emitted in zip(rows, one.emitted, strict=True):
            row += [emission.token for emission in emitted]
    return rows, passes


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_tokens_are_those_of_plain_decoding(made: Decoder, share: float) -> None:
    for ids, knobs, confidence in itertools.product((IDS, IDS[1:2]), KNOBS[:3], (0.0, 0.8)):
        if knobs.get("temperature") and len(ids) > 1:
            continue
        drafter = LayerSkip(share, confidence=confidence)
        assert tokens(made, ids, drafter, knobs)[0] == tokens(made, ids, None, knobs)[0]


def test_a_whole_model_drafts_its_own_tokens(made: Decoder) -> None:
    found, passes = tokens(made, IDS[1:2], LayerSkip(0.0, confidence=0.0), {})
    plain, singly = tokens(made, IDS[1:2], None, {})
    assert found == plain
    assert passes <= 2 + singly // 5


def test_a_chain_ends_behind_an_unlikely_token(made: Decoder) -> None:
    sure, hesitant = (tokens(made, IDS[1:2], LayerSkip(0.0, confidence=c), {})[1] for c in (0.0, 1.1))
    assert sure < hesitant <= 11


def test_the_search_keeps_what_is_accepted_more_often() -> None:
    """Blocks 3 and 7 must not be missing: the share of accepted tokens falls with each."""
    search, source, scores = Search(0.4), random.Random(1), []
    for _ in range(4000):
        skipped = search.skipped(12)
        assert 0 not in skipped
        assert 11 not in skipped
        assert len(skipped) == 4
        rate = 0.97 - 0.4 * len(skipped & {3, 7})
        search.note(4, sum(source.random() < rate for _ in range(4)))
        scores.append(rate)
    assert not search.best & {3, 7}
    assert scores[-1] > scores[0] or scores[0] > ENOUGH
    assert search.score > 0.9


def test_a_search_starts_again_for_another_model_and_stops_when_all_is_accepted() -> None:
    search = Search(0.5)
    first = search.skipped(8)
    for _ in range(WINDOW):
        search.note(1, 1)
    assert search.trial == search.best == first
    search.note(WINDOW, 0)
    assert search.trial == first
    assert search.skipped(2) == frozenset()
    search.note(WINDOW, WINDOW)
    assert search.skipped(8) == first


def test_without_a_model_nothing_is_drafted() -> None:
    drafting = LayerSkip().start((1, 2), Choice((), True, seeded(0, torch.device("cpu"))))
    assert drafting.propose(4, 4).tokens == (2,)
