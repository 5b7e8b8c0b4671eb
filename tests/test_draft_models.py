"""Drafts of a smaller model: chains, trees without replacement and independent drafts keep tokens and laws."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from enumeration import law_of, variation
from prefix_model import PrefixStepper, random_model
from spelled_models import tiny_llama
from test_speculation import KNOBS, PROMPT, run

from subquad.ir.decoding import Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.draft_model import DraftModel
from subquad.passes.speculate.recursive_drafts import ConstantBranching, StochasticBeam, conditioned
from subquad.passes.speculate.spectr import SpecTr
from subquad.runtime.chance import seeded


def drafters(seed: int, vocabulary: int, memory: int = 3) -> dict:
    small = lambda: PrefixStepper(random_model(seed, vocabulary, memory))  # noqa: E731
    return {
        "chain": DraftModel(small, vocabulary, tokens=2, confidence=0.0),
        "confident chain": DraftModel(small, vocabulary, tokens=2, confidence=0.5),
        "RSD-C": ConstantBranching(small, vocabulary, (2, 1)),
        "RSD-S": StochasticBeam(small, vocabulary, 2, 2),
        "SpecTr": SpecTr(small, vocabulary, 2, 2),
    }


@pytest.mark.parametrize("trees", [True, False], ids=["tree", "chain"])
@pytest.mark.parametrize("name", drafters(0, 8))
def test_greedy_tokens_are_those_of_plain_decoding(name: str, trees: bool) -> None:
    """Drafts right always (the same model) and mostly wrong; batches of 1 and 4; penalties and ends."""
    forward = random_model(3, memory=2)
    four = torch.tensor([[0, 0, 4, 2], [1, 2, 3, 4], [0, 5, 5, 5], [6, 1, 6, 1]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    for (ids, keep), knobs, ends, seed in itertools.product(
        ((PROMPT, None), (four, mask)), KNOBS[:4], ((), (5,)), (3, 4)
    ):
        options = {"ids": ids, "mask": keep, "knobs": knobs, "ends": ends, "count": 12}
        drafter = drafters(seed, 8, 2 if seed == 3 else 3)[name]
        got, stepper = run(forward, drafter, trees=trees, **options)
        assert got == run(forward, **options)[0]
        if seed == 3 and not knobs and not ends and "confident" not in name:
            assert stepper.passes <= 4


@pytest.mark.parametrize("trees", [True, False], ids=["tree", "chain"])
@pytest.mark.parametrize("name", ["chain", "confident chain", "RSD-C", "SpecTr"])
def test_sampled_tokens_have_the_law_of_plain_sampling(name: str, trees: bool) -> None:
    """All outcomes of the draws of draft and acceptance together, under temperature and a penalty."""
    forward = random_model(21, 3, memory=2)
    drafter = drafters(22, 3)[name]

    def law(drafting: bool) -> dict:
        options = {
            "trees": trees,
            "count": 3,
            "knobs": {"temperature": 0.7, "repetition_penalty": 1.3},
            "ids": PROMPT[:, :1] % 3,
        }
        return law_of(lambda chance: tuple(run(forward, drafter if drafting else None, chance=chance, **options)[0][0]))

    want = law(False)
    assert len(want) == 27
    assert variation(law(True), want) < 1e-6


def test_stochastic_beams_have_the_law_of_plain_sampling() -> None:
    """Monte Carlo over two tokens after the first: the error stays within twice the noise expected of 1,500 samples."""
    forward = random_model(21, 3, memory=2)
    drafter = drafters(22, 3)["RSD-S"]
    knobs = {"temperature": 0.9}
    ids = PROMPT[:, :1] % 3
    want = law_of(lambda chance: tuple(run(forward, chance=chance, count=3, knobs=knobs, ids=ids)[0][0]))
    chance, count = seeded(0, torch.device("cpu")), 1500
    got: dict = {}
    for _ in range(count):
        tokens = tuple(run(forward, drafter, chance=chance, count=3, knobs=knobs, ids=ids)[0][0])
        got[tokens] = got.get(tokens, 0.0) + 1 / count
    noise = 0.5 * (2 / torch.pi) ** 0.5 * sum((p * (1 - p) / count) ** 0.5 for p in want.values())
    assert variation(got, want) < 2 * noise


def test_conditioned_noise_has_the_maximum_it_is_given() -> None:
    known = torch.tensor([0.2, 0.5, 0.3, 0.0], dtype=torch.float64).log()
    uniform = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = conditioned(known, -1.5, uniform)
    assert float(values.max()) == pytest.approx(-1.5)
    assert values[3] == -torch.inf
    assert not values.isnan().any()


def test_rows_are_respected_by_drawn_trees() -> None:
    for name, drafter in drafters(5, 8).items():
        for rows, depth in itertools.product(range(6), range(4)):
            drafting = drafter.start((3, 1, 2), Choice((), False, seeded(0, torch.device("cpu"))))
            tree = drafting.propose(rows, depth)
            assert len(tree) <= 1 + rows, name
            assert max(tree.depths) <= depth


def test_a_draft_that_was_cut_is_drafted_again_from_the_committed_tokens() -> None:
    """The token behind the last verified node is the one that was drafted there, and the draft model has read it."""
    knobs, model = Choice((), True, seeded(0, torch.device("cpu"))), drafters(5, 8)["confident chain"]
    model = replace(model, tokens=4, confidence=0.0)
    drafting = model.start((3, 1, 2), knobs)
    for _ in range(3):
        whole = drafting.propose(4, 4)
        tokens = whole.tokens[1:3]
        drafting.observe(Verified(whole.first(2), (0, 1), tokens, torch.zeros(2, 8)))
    assert drafting.propose(4, 4) == model.start(drafting.tokens, knobs).propose(4, 4)
    assert drafting.stepper.committed == [(*drafting.tokens, *drafting._drafted[:-1])]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_hugging_face_model_steps_verifies_and_cuts_back(attention: str) -> None:
    pytest.importorskip("transformers")
    from subquad.runtime.hf_stepper import HuggingFaceStepper

    model = tiny_llama(2, attention).double()
    ids = torch.tensor([[5, 9, 3, 7]])
    stepper = HuggingFaceStepper(model, trees=True)
    stepper.prefill(ids[:, :3], None)

    def whole(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1]

    tree = DraftTree((7, 11, 12, 13, 14), (-1, 0, 0, 1, 2))
    rows = stepper.verify([tree])[0]
    for node in range(5):
        path, at = [], node
        while at >= 0:
            path.append(tree.tokens[at])
            at = tree.parents[at]
        torch.testing.assert_close(rows[node], whole([5, 9, 3, *path[::-1]]), rtol=1e-5, atol=1e-6)
    stepper.commit([(0, 2, 4)])
    row = stepper.verify([DraftTree.chain((20, 21))])[0][1]
    torch.testing.assert_close(row, whole([5, 9, 3, 7, 12, 14, 20, 21]), rtol=1e-5, atol=1e-6)
    stepper.commit([(0,)])
    stepper.rollback([2])
    row = stepper.verify([DraftTree.chain((30,))])[0][0]
    torch.testing.assert_close(row, whole([5, 9, 3, 7, 12, 30]), rtol=1e-5, atol=1e-6)
