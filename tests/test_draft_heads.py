"""Trained heads: what they read is what the model's head read, their trees are the likeliest, tokens stay those of plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_models import sharp_llama, tiny_llama
from test_speculation import KNOBS

import subquad
from subquad.decoder import Decoder
from subquad.incremental import decoder
from subquad.ir.decoding import Choice, Drafter, Verified
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError
from subquad.ir.trained import Trained, head_digest
from subquad.passes.speculate.draft_heads import DraftHeads
from subquad.passes.speculate.head_drafts import HeadDrafter
from subquad.passes.speculate.likeliest_tree import grow
from subquad.passes.speculate.speculate import HEADS, Speculate
from subquad.runtime.chance import seeded
from subquad.runtime.pacing import FixedPacing
from subquad.runtime.processors import processors
from subquad.runtime.speculation import Ending
from subquad.runtime.tree_stepper import TreeStepper

IDS = torch.tensor([[0, 0, 0, 5, 9, 5, 9], [3, 4, 3, 4, 3, 4, 3], [3, 4, 3, 4, 8, 8, 8]])
TREE = DraftTree((7, 3, 4, 5, 6), (-1, 0, 0, 1, 2))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made() -> Decoder:
    return decoder(subquad.rewrite(sharp_llama(2), passes="fuse", verify=False))


def random_heads(kind: type[DraftHeads], head: torch.Tensor, levels: int = 3) -> DraftHeads:
    torch.manual_seed(1)
    heads = kind(head.shape[1], torch.arange(1, 64, 2), 16, levels).fitted(head)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return kind.restored(heads.parameters_by_name(), head)


def tokens(
    made: Decoder, ids: torch.Tensor, drafter: Drafter | None, knobs: dict[str, Any], nodes: int = 4
) -> tuple[Any, int]:
    choice = Choice(processors(**knobs), knobs.get("temperature", 0.0) == 0, seeded(0, torch.device("cpu")))
    rows: list[list[int]] = [[] for _ in ids]
    passes = 0
    for one in made.decode(
        ids, (ids != 0).long(), choice=choice, ending=Ending(20, {63}), drafter=drafter, pacing=FixedPacing(nodes)
    ):
        passes += 1
        for row, emitted in zip(rows, one.emitted, strict=True):
            row += [emission.token for emission in emitted]
    return rows, passes


@pytest.mark.parametrize("share", [False, True])
def test_what_the_head_read_gives_the_logits(made: Decoder, share: bool) -> None:
    readout = made.engine.readout
    assert readout is not None
    ids = IDS[1:].repeat(1, 30)
    stepper = TreeStepper(made.engine, 256, share)
    stepper.prefill(ids, None)
    logits = stepper.verify([TREE, None])
    assert torch.allclose(stepper.hidden(0, [0, 3, 4]) @ readout.weight.T, logits[0][[0, 3, 4]], atol=1e-4)
    stepper.commit([[0, 1, 3], []])
    logits = stepper.verify([TREE.first(2), TREE])
    assert torch.allclose(stepper.hidden(1, range(5)) @ readout.weight.T, logits[1], atol=1e-4)


class Capped(torch.nn.Linear):
    """A head of logits with a softcap behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * (super().forward(x) / 3).tanh()


def test_a_softcap_behind_the_product_is_seen_through() -> None:
    model = tiny_llama(2)
    model.lm_head = Capped(48, 64, bias=False)
    capped = decoder(subquad.rewrite(model, passes="fuse", verify=False))
    assert capped.engine.readout is not None
    state = capped.engine.start(1, 8)
    capped.engine.run(state, IDS[1:2, :3])
    logits, stream = capped.engine.verify(state, IDS[1:2, 3:6])
    plain = capped.engine.readout.reads(stream[0, :, None]) @ capped.engine.readout.weight.T
    assert torch.allclose(3 * (plain / 3).tanh(), logits[0], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.sampled_from([0.0, 0.1]))
def test_a_tree_holds_the_likeliest_nodes(seed: int, rows: int, depth: int, branch: int, least: float) -> None:
    source = torch.Generator().manual_seed(seed)
    table = torch.randn(5, 64, 6, generator=source) * 2
    ids = torch.tensor([3, 5, 7, 11, 13, 17])

    def scores(level: int, path: tuple[int, ...]) -> torch.Tensor:
        return table[level, sum((n + 1) * t for n, t in enumerate(path)) % 64]

    def guess(level: int, paths: torch.Tensor) -> torch.Tensor:
        assert paths.shape[1] == level
        return torch.stack([scores(level, tuple(path.tolist())) for path in paths])

    tree = grow(2, guess, ids, rows, depth, branch, least)
    best: dict[tuple[int, ...], float] = {}
    for level in range(depth):
        for path in [()] if level == 0 else [p for p in best if len(p) == level]:
            law = scores(level, path).softmax(-1)
            for place in law.topk(branch if branch < 6 else 6).indices.tolist():
                best[*path, int(ids[place])] = best.get(path, 1.0) * float(law[place])
    wanted = sorted((v for v in best.values() if v >= least), reverse=True)[:rows]
    assert tree.tokens[0] == 2
    assert tree.values[1:] == pytest.approx(wanted, rel=1e-4)
    for node in range(1, len(tree)):
        assert tree.parents[node] < node
        path, at = (), node
        while at > 0:
            path, at = (tree.tokens[at], *path), tree.parents[at]
        assert tree.values[node] == pytest.approx(best[path], rel=1e-4)
    for below in tree.children:
        assert len({tree.tokens[n] for n in below}) == len(below)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_tokens_are_those_of_plain_decoding(made: Decoder, name: str) -> None:
    head = made.trained.found_head(name)
    for ids, knobs, nodes in itertools.product((IDS, IDS[1:2]), KNOBS[:3], (2, 7)):
        if knobs.get("temperature") and len(ids) > 1:
            continue
        drafter = HeadDrafter(random_heads(HEADS[name], head), least=0.0)
        assert tokens(made, ids, drafter, knobs, nodes)[0] == tokens(made, ids, None, knobs)[0]


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_level_is_the_same_alone_and_in_a_batch(name: str) -> None:
    """What drafting asks for one path at a time is what training computes for all places at once."""
    head = torch.randn(64, 48)
    heads = random_heads(HEADS[name], head)
    hidden, path = torch.randn(3, 48), torch.randint(0, 64, (3, 3))
    for level in range(heads.levels):
        together = heads.scores(level, hidden, path[:, : level + 1])
        for n in range(3):
            alone = heads.guesses(hidden[n : n + 1], int(path[n, 0]))(level, path[n : n + 1, 1 : level + 1])
            assert torch.allclose(alone[0], together[n], atol=1e-4)


def test_drafts_go_on_from_the_last_accepted_node() -> None:
    head = torch.randn(64, 48)
    drafting = HeadDrafter(random_heads(HEADS["hydra"], head), least=0.0).start(
        (1, 2), Choice((), True, seeded(0, torch.device("cpu")))
    )
    assert drafting.propose(4, 4).tokens == (2,)
    asked: list[list[int]] = []

    def hidden(nodes: Any) -> torch.Tensor:
        asked.append(list(nodes))
        return torch.randn(1, 48)

    drafting.observe(Verified(TREE, (0, 1, 3), (3, 5, 9), torch.randn(5, 64), hidden))
    assert asked == [[3]]
    tree = drafting.propose(4, 4)
    assert tree.tokens[0] == 9
    assert len(tree) == 5
    drafting.observe(Verified(TREE, (0,), (8,), torch.randn(5, 64)))
    assert drafting.propose(4, 4).tokens == (8,)


def test_parameters_that_do_not_fit_are_refused_in_one_sentence() -> None:
    head, other = torch.randn(64, 48), torch.randn(64, 48)
    kept = {"hydra": random_heads(HEADS["hydra"], head).parameters_by_name()}
    known = Trained(kept, {"hydra": head_digest(head)}, head)
    assert isinstance(Speculate(method="hydra").drafter(known), HeadDrafter)
    cases = {
        "no trained medusa drafter": (Speculate(method="medusa"), known),
        "for another model": (Speculate(method="hydra"), Trained(kept, known.models, other)),
        "ends in something else": (Speculate(method="hydra"), Trained(kept, known.models, None)),
        "are no hydra heads": (
            Speculate(method="hydra"),
            Trained({"hydra": {"ids": torch.arange(3)}}, known.models, head),
        ),
        "has 64 tokens": (
            Speculate(method="hydra"),
            Trained({"hydra": kept["hydra"] | {"ids": torch.arange(63, 95)}}, known.models, head),
        ),
    }
    for words, (way, trained) in cases.items():
        with pytest.raises(GenerationError, match=words) as caught:
            way.drafter(trained)
        assert "\n" not in str(caught.value)
    assert head_digest(head.bfloat16()) == head_digest(head.bfloat16().float())


def test_what_was_trained_joins_the_default() -> None:
    head = torch.randn(64, 48)
    kept = {"medusa": random_heads(HEADS["medusa"], head).parameters_by_name()}
    union: Any = Speculate().drafter(Trained(kept, {"medusa": head_digest(head)}, head))
    assert [type(part).__name__ for part in union.parts] == ["SuffixMatch", "TokenRecycling", "HeadDrafter"]
    assert len(Speculate().drafter().parts) == 2  # type: ignore[attr-defined]


class TwoHeads(torch.nn.Module):
    """Logits that are the sum of two products."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Linear(48, 64, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)  # type: ignore[no-any-return]


def test_a_model_without_one_head_says_so() -> None:
    model = tiny_llama(2)
    model.lm_head = TwoHeads()
    ends = decoder(subquad.rewrite(model, passes="fuse", verify=False))
    with pytest.raises(GenerationError, match="ends in something else"):
        ends.trained.found_head("hydra")
