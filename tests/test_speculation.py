"""The decoding engine gives the tokens of plain decoding under every drafter, processor, stop and limit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from enumeration import law_of, variation
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_model import Forward, PrefixStepper, random_model

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError
from subquad.passes.speculate.greedy import Greedy
from subquad.passes.speculate.k_sequential import KSequential
from subquad.passes.speculate.recursive_rejection import RecursiveRejection
from subquad.passes.speculate.sample_and_descend import SampleAndDescend
from subquad.passes.speculate.speculative_sampling import SpeculativeSampling
from subquad.runtime.chance import TorchChance, seeded
from subquad.runtime.pacing import FixedPacing
from subquad.runtime.processors import processors
from subquad.runtime.speculation import Ending, speculate

PROMPT = torch.tensor([[3, 1, 2]])


@dataclass
class Scripted:
    """Drafts trees of a given quality: the truth, the truth among wrong siblings, random ones, or nothing."""

    forward: Forward
    quality: str
    vocabulary: int = 8
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)
    seen: list[Verified] = field(default_factory=list)

    def start(self, tokens: Sequence[int], choice: Choice) -> ScriptedRow:
        return ScriptedRow(self, list(tokens), random.Random(len(tokens)))


@dataclass
class ScriptedRow:
    drafter: Scripted
    tokens: list[int]
    source: random.Random

    def propose(self, rows: int, depth: int) -> DraftTree:
        tokens, parents, truth = [self.tokens[-1]], [-1], 0
        d, v = self.drafter, self.drafter.vocabulary
        if d.quality == "nothing":
            return DraftTree((self.tokens[-1],), (-1,))
        prefix = tuple(self.tokens)
        while len(tokens) <= rows:
            if d.quality == "random":
                parent, token = self.source.randrange(len(tokens)), self.source.randrange(v)
                if any(p == parent and t == token for p, t in zip(parents, tokens, strict=True)):
                    break
            else:
                right = int(d.forward(prefix).argmax())
                parent = truth
                token = (
                    (right + 1) % v
                    if d.quality == "wrong" or (d.quality == "mixed" and parents[-1] != truth)
                    else right
                )
                if token == right:
                    truth, prefix = len(tokens), (*prefix, token)
                elif d.quality == "wrong":
                    truth = len(tokens)
            tokens.append(token)
            parents.append(parent)
        return DraftTree(tuple(tokens), tuple(parents))

    def observe(self, result: Verified) -> None:
        assert result.path[0] == 0
        assert len(result.path) == len(result.tokens)
        assert tuple(result.tree.tokens[n] for n in result.path[1:]) == result.tokens[:-1]
        assert result.logits.shape[0] == len(result.tree)
        self.tokens += result.tokens
        self.drafter.seen.append(result)


QUALITIES = ("truth", "mixed", "wrong", "random", "nothing")


def run(
    forward: Forward, drafter=None, *, trees=True, ids=PROMPT, mask=None, count=12, ends=(), stops=(), knobs=None, seed=0,
    nodes=7, limit=None, chance=None, pacing=None,
):  # fmt: skip
    """(tokens per row, passes, stepper) of one decoding."""
    knobs = knobs or {}
    stepper = PrefixStepper(forward, trees, limit)
    choice = Choice(
        processors(**knobs), not knobs.get("temperature"), chance if chance is not None else seeded(seed, torch.device("cpu"))
    )  # fmt: skip
    rows: list[list[int]] = [[] for _ in range(ids.shape[0])]
    plain = Greedy() if choice.greedy else SampleAndDescend()
    for one in speculate(
        stepper, ids, mask, choice=choice, plain=plain, ending=Ending(count, ends, stops), drafter=drafter,
        pacing=pacing or FixedPacing(nodes),
    ):  # fmt: skip
        for row, new in zip(rows, one.emitted, strict=True):
            row += [e.token for e in new]
    for n, row in enumerate(rows):
        prompt = ids[n] if mask is None else ids[n][mask[n] != 0]
        assert stepper.committed[n] == (*prompt.tolist(), *row[:-1])
    return rows, stepper


KNOBS = (
    {},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 4, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.05},
)


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_tokens_are_those_of_plain_decoding(quality: str, trees: bool, knobs: dict) -> None:
    """Greedy, and sampled with the same seed: R1 draws once per token, in order, from the same row."""
    for seed in range(3):
        forward = random_model(seed)
        want, plain = run(forward, knobs=knobs, seed=seed)
        got, stepper = run(forward, Scripted(forward, quality), trees=trees, knobs=knobs, seed=seed)
        assert got == want
        if quality == "truth" and not knobs:
            assert stepper.passes == 2 < plain.passes


@pytest.mark.parametrize("quality", QUALITIES)
def test_every_limit_and_every_end_inside_a_draft(quality: str) -> None:
    forward = random_model(5)
    want = run(forward, count=20)[0][0]
    for count in (1, 2, 3, 7, 8, 9, 20):
        assert run(forward, Scripted(forward, quality), count=count)[0][0] == want[:count]
    for end in set(want):
        cut = want[: want.index(end) + 1]
        assert run(forward, Scripted(forward, quality), count=20, ends=[end])[0][0] == cut
    for length in range(1, 20):
        stop = lambda row, prefix, scores, n=length: prefix.shape[1] == PROMPT.shape[1] + n  # noqa: E731
        assert run(forward, Scripted(forward, quality), count=20, stops=(stop,))[0][0] == want[:length]


def test_stops_and_processors_see_every_true_prefix_once_and_in_order() -> None:
    forward = random_model(6)
    seen: dict[bool, list[list[int]]] = {}
    for drafting in (False, True):
        met: list[list[int]] = []
        stop = lambda row, prefix, scores, met=met: bool(met.append(prefix[0].tolist()))  # noqa: E731
        run(forward, Scripted(forward, "mixed") if drafting else None, stops=(stop,))
        seen[drafting] = met
    assert seen[True] == seen[False]


@pytest.mark.parametrize("quality", QUALITIES)
def test_ragged_batches_equal_their_rows(quality: str) -> None:
    forward = random_model(7)
    ids = torch.tensor([[0, 0, 4, 2], [1, 2, 3, 4], [0, 5, 5, 5]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    ends = run(forward, ids=ids[:1, 2:])[0][0][4:5]
    want = [run(forward, ids=row[keep != 0][None], ends=ends)[0][0] for row, keep in zip(ids, mask, strict=True)]
    assert len({len(row) for row in want}) > 1
    assert run(forward, Scripted(forward, quality), ids=ids, mask=mask, ends=ends)[0] == want


def test_a_draft_never_goes_deeper_than_the_room_or_the_position_table() -> None:
    forward = random_model(8)
    want = run(forward, count=6)[0]
    got, stepper = run(forward, Scripted(forward, "truth"), count=6, nodes=50)
    assert (got, stepper.deepest, stepper.passes) == (want, 4, 1)
    assert run(forward, Scripted(forward, "mixed"), count=6, limit=PROMPT.shape[1] + 6)[0] == want


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), quality=st.sampled_from(QUALITIES), trees=st.booleans(), nodes=st.integers(1, 12),
       count=st.integers(1, 15), length=st.integers(1, 6), end=st.integers(0, 7), knobs=st.sampled_from(KNOBS))  # fmt: skip
def test_any_combination(seed, quality, trees, nodes, count, length, end, knobs) -> None:
    forward = random_model(seed)
    ids = torch.randint(0, 8, (1, length), generator=torch.Generator().manual_seed(seed))
    options = {"ids": ids, "count": count, "ends": [end], "knobs": knobs, "seed": seed}
    assert (
        run(forward, Scripted(forward, quality), trees=trees, nodes=nodes, **options)[0] == run(forward, **options)[0]
    )


@dataclass
class Drawn:
    """Draws its drafts from a law of its own, as a draft model does."""

    acceptance: AcceptanceRule
    shape: str
    law: Forward

    def start(self, tokens: Sequence[int], choice: Choice) -> DrawnRow:
        return DrawnRow(self, tuple(tokens), choice)


@dataclass
class DrawnRow:
    drafter: Drawn
    tokens: tuple[int, ...]
    choice: Choice

    def propose(self, rows: int, depth: int) -> DraftTree:
        from test_acceptance_rules import chain, independent, siblings

        law = lambda path: self.drafter.law((*self.tokens, *path)).double().softmax(-1)[None]  # noqa: E731
        make = {
            "chain": lambda: chain(law, 2, self.choice.chance),
            "siblings": lambda: siblings(law, (2, 1), self.choice.chance),
            "independent": lambda: independent(law, 2, 2, self.choice.chance),
        }
        tree = make[self.drafter.shape]()
        return DraftTree((self.tokens[-1], *tree.tokens[1:]), tree.parents, (), tree.laws, tree.draws)

    def observe(self, result: Verified) -> None:
        self.tokens += result.tokens


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize(
    "drafter",
    [
        Drawn(SpeculativeSampling(), "chain", random_model(22, 3)),
        Drawn(RecursiveRejection(), "siblings", random_model(22, 3)),
        Drawn(KSequential(), "independent", random_model(22, 3)),
        Scripted(random_model(22, 3), "mixed", 3),
    ],
    ids=["R2", "R3", "R4", "R1"],
)
def test_sampled_tokens_have_the_law_of_plain_sampling(drafter, trees: bool) -> None:
    """All outcomes of two tokens under penalties and temperature; laws in float32, as scores are."""
    forward = random_model(21, 3, memory=2)
    knobs = {"temperature": 0.7, "repetition_penalty": 1.3}

    def law(with_draft: bool) -> dict:
        return law_of(
            lambda chance: tuple(
                run(forward, drafter if with_draft else None, trees=trees, count=2, knobs=knobs, chance=chance, ids=PROMPT[:, :1] % 3)[0][0]
            )
        )  # fmt: skip

    want = law(False)
    assert len(want) == 9
    assert variation(law(True), want) < 1e-6


def test_greedy_decoding_draws_nothing() -> None:
    forward = random_model(9)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(forward, Scripted(forward, "mixed"), chance=TorchChance())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_wrong_is_said() -> None:
    forward = random_model(10)

    def broken(prefix: tuple[int, ...]) -> torch.Tensor:
        logits = forward(prefix).clone()
        if len(prefix) == 6:
            logits[2] = torch.nan
        return logits

    with pytest.raises(GenerationError, match="row 0 after 6 tokens hold NaN"):
        run(broken, Scripted(forward, "truth"))
    with pytest.raises(GenerationError, match="proposed token 9, but the model has 8 tokens"):
        run(forward, Scripted(lambda prefix: random_model(1, 16)(prefix) + 50 * (torch.arange(16) == 9), "truth", 16))
    with pytest.raises(GenerationError, match="no allowed token"):
        run(lambda prefix: torch.full((8,), -torch.inf), knobs={"temperature": 1.0})
