"""PPD: prompt tokens beside a draft change nothing that is decoded, read what they should, and learn through the frozen model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_models import sharp_llama
from test_draft_heads import IDS, KNOBS, tokens

import subquad
from subquad.decoder import Decoder
from subquad.incremental import decoder
from subquad.ir.decoding import Choice
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError, PassError
from subquad.ir.probes import Probes
from subquad.ir.trained import Trained, head_digest
from subquad.passes.speculate.probe_budget import divided, with_most_worth
from subquad.passes.speculate.prompt_tokens import MASKS, PromptTokenDrafter, PromptTokens
from subquad.passes.speculate.speculate import Speculate
from subquad.passes.speculate.suffix_automaton import SuffixMatch
from subquad.passes.speculate.union import Union
from subquad.runtime.chance import seeded
from subquad.runtime.pacing import MeasuredPacing
from subquad.runtime.tree_stepper import TreeStepper
from subquad.speculation_words import spoken
from subquad.training.foretold import Foretold, written
from subquad.training.recipes import RECIPES, Material

PLAIN = Choice((), True, seeded(0, torch.device("cpu")))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama(2)


@pytest.fixture(scope="module")
def fast(model: Any) -> Any:
    return subquad.rewrite(model, passes="fuse", verify=False)


@pytest.fixture(scope="module")
def made(fast: Any) -> Decoder:
    return decoder(fast)


def prompt_tokens(noise: float = 0.5, copies: int = 1, mask: str = "ensemble", seed: int = 1) -> PromptTokens:
    source = torch.Generator().manual_seed(seed)
    return PromptTokens(torch.tensor([5, 9, 11]), noise * torch.randn(copies, 3, 48, generator=source), mask, 64)


@pytest.mark.parametrize("noise", [0.0, 0.5, 50.0], ids=["untrained", "moved", "adversarial"])
@pytest.mark.parametrize("copies", [1, 2])
def test_tokens_are_those_of_plain_decoding(made: Decoder, noise: float, copies: int) -> None:
    four = torch.cat([IDS, IDS[1:2].flip(1)])
    for ids, knobs, nodes in itertools.product((four, IDS[1:2]), (*KNOBS[:2], KNOBS[4]), (2, 9)):
        if knobs.get("temperature") and len(ids) > 1:
            continue
        drafter = PromptTokenDrafter(prompt_tokens(noise, copies), least=0.0)
        assert tokens(made, ids, drafter, knobs, nodes)[0] == tokens(made, ids, None, knobs)[0]


@pytest.mark.parametrize("mask", MASKS)
def test_a_probe_reads_what_stands_before_it(model: Any, made: Decoder, mask: str) -> None:
    """Against the model itself, run on embeddings with a mask of its own for each probe."""
    part = prompt_tokens(0.3, 2, mask)
    tree = DraftTree((7, 3, 4, 5), (-1, 0, 0, 1), (1.0,) * 4, probes=part.probes([1, 0, 3, 2]))
    stepper = TreeStepper(made.engine, 64)
    prompt = IDS[1:2]
    stepper.prefill(prompt, None)
    logits = stepper.verify([tree])[0]
    assert len(logits) == tree.rows == 4 + 2 * 6
    probes = tree.probes
    assert probes is not None
    table, length = model.model.embed_tokens.weight, prompt.shape[1]
    ids = torch.cat([prompt[0], torch.tensor(tree.tokens), torch.tensor(probes.tokens)])
    rows = table[ids].clone()
    rows[length + 4 :] += probes.added
    seen = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    seen[:length, :length] = torch.ones(length, length).tril().bool()
    seen[length:, :length] = True
    seen[length : length + 4, length : length + 4] = tree.ancestors()
    places = [*range(length), *(length + d for d in tree.depths)]
    for n in range(len(probes)):
        seen[length + 4 + n, length : length + 4] = tree.ancestors()[probes.nodes[n]]
        places.append(length + tree.depths[probes.nodes[n]] + probes.depths[n])
        for other in range(len(probes)):
            if probes.nodes[other] != probes.nodes[n]:
                continue
            same, before = probes.copies[other] == probes.copies[n], probes.depths[other] - probes.depths[n]
            allowed = {"ensemble": same and before <= 0, "decoder": before < 0 or other == n, "encoder": before <= 0}
            seen[length + 4 + n, length + 4 + other] = allowed[mask]
    want = model(inputs_embeds=rows[None], attention_mask=seen[None, None], position_ids=torch.tensor([places])).logits
    assert torch.allclose(logits, want[0, length:], atol=1e-3)
    stepper.commit([[0, 1, 3]])
    after = stepper.verify([DraftTree((9,), (-1,))])[0]
    whole = model(torch.cat([prompt[0], torch.tensor([7, 3, 5, 9])])[None]).logits[0, -1:]
    assert torch.allclose(after, whole, atol=1e-3)


def test_probes_go_with_their_nodes() -> None:
    part = prompt_tokens()
    tree = DraftTree((7, 3, 4, 5), (-1, 0, 0, 1), (1.0, 0.5, 0.4, 0.3), probes=part.probes([2, 0, 1, 3]))
    assert tree.rows == 10
    assert tree.first(3).probes.nodes == (0, 0, 2)  # type: ignore[union-attr]
    assert tree.within(1).probes.nodes == (0, 0, 2)  # type: ignore[union-attr]
    chain = tree.first_path()
    assert chain.tokens == (7, 3, 5)
    assert chain.probes.nodes == (2, 2, 2)  # type: ignore[union-attr]
    assert chain.probes.seen.equal(torch.ones(3, 3).tril().bool())  # type: ignore[union-attr]
    assert tree.first(2).first_path().probes is None
    pacing = MeasuredPacing()
    assert pacing.cut([tree])[0].rows <= 16  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 14), st.integers(1, 2))
def test_rows_are_divided_where_they_are_worth_most(seed: int, rows: int, copies: int) -> None:
    source = torch.Generator().manual_seed(seed)
    parents, values = [-1], [1.0]
    for node in range(1, 6):
        parents.append(int(torch.randint(node, (1,), generator=source)))
        values.append(values[parents[-1]] * 0.3)
    order = sorted(range(6), key=lambda n: -values[n])
    place = {old: new for new, old in enumerate(order)} | {-1: -1}
    tree = DraftTree(tuple(range(6)), tuple(place[parents[n]] for n in order), tuple(values[n] for n in order))
    part, worth = prompt_tokens(copies=copies), [0.0, 0.6, 0.9, 1.0]
    found = with_most_worth(tree, rows, part, worth)
    assert found.rows - 1 <= rows
    counts = divided(tree, len(found) - 1, (rows - len(found) + 1) // copies, worth)
    assert (found.rows - len(found)) == copies * sum(counts)
    if rows >= 3 * copies and rows < 4 * copies:
        assert found.probes is not None


def test_what_united_drafters_probe_is_kept(made: Decoder) -> None:
    part = prompt_tokens()
    united = Union((SuffixMatch(), PromptTokenDrafter(part, least=0.0)))
    drafting = united.start((3, 4, 3, 4, 3), PLAIN)
    tree = drafting.propose(8, 6)
    assert tree.probes is not None
    assert tree.rows - 1 <= 8
    assert set(tree.probes.nodes) == {0}
    for ids in (IDS, IDS[1:2]):
        assert tokens(made, ids, united, {}, 9)[0] == tokens(made, ids, None, {})[0]


def test_parameters_that_do_not_fit_are_refused() -> None:
    head = torch.randn(64, 48)
    kept, digest = {"ppd": prompt_tokens().parameters_by_name()}, {"ppd": head_digest(head)}
    assert isinstance(Speculate(method="ppd").drafter(Trained(kept, digest, head)), PromptTokenDrafter)
    cases = {
        "no trained ppd drafter": Trained({}, {}, head),
        "for another model": Trained(kept, digest, torch.randn(64, 48)),
        "are no ppd prompt tokens": Trained({"ppd": {"ids": torch.arange(3)}}, digest, head),
        "has 64 tokens": Trained({"ppd": kept["ppd"] | {"ids": torch.arange(63, 66)}}, digest, head),
    }
    for words, trained in cases.items():
        with pytest.raises(GenerationError, match=words):
            Speculate(method="ppd").drafter(trained)
    with pytest.raises(PassError, match="prompt_mask 'some' is unknown"):
        subquad.rewrite(sharp_llama(1), passes="speculate(method='ppd', prompt_mask='some')", verify=False)
    assert spoken({"method": "ppd"}, None) == Speculate(method="ppd")


@pytest.mark.parametrize(("copies", "mask"), [(1, "ensemble"), (2, "decoder")])
def test_what_was_learnt_is_accepted(fast: Any, made: Decoder, copies: int, mask: str) -> None:
    """The loss falls, the model's own weights stay, and passes get fewer than without training."""
    source = torch.Generator().manual_seed(3)
    seen = [written(made, torch.randint(1, 64, (16, 6), generator=source).tolist(), (), 64) for _ in range(3)]
    head, loop = made.trained.found_head("ppd"), Speculate(method="ppd", prompt_copies=copies, prompt_mask=mask)
    before = {name: p.clone() for name, p in fast.named_parameters()}
    torch.manual_seed(0)
    training: Any = RECIPES["ppd"](Material(fast, made, head, Foretold.joined(seen), loop), 0)
    losses = [training.work(number)["loss"] for number in range(training.batches)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(torch.equal(p, before[name]) for name, p in fast.named_parameters())
    part = PromptTokens.restored(training.part.parameters_by_name(), head)
    assert (part.copies, part.mask) == (copies, mask)
    assert len(training.guessed()) == 3


def test_what_is_learnt_is_what_the_pass_computes(fast: Any, made: Decoder) -> None:
    """Training's logits behind a cut are those of probes in a pass at the same place."""
    source = torch.Generator().manual_seed(4)
    seen = written(made, torch.randint(1, 64, (2, 6), generator=source).tolist(), (), 20)
    head, loop = made.trained.found_head("ppd"), Speculate(method="ppd", prompt_copies=2, prompt_mask="encoder")
    training: Any = RECIPES["ppd"](Material(fast, made, head, seen, loop), 0)
    training.added.copy_(torch.randn(training.added.shape, generator=source))
    place, cuts = seen.sequences()[0], torch.tensor([8, 12])
    found = training._logits(place, cuts)
    part = PromptTokens.restored(training.part.parameters_by_name(), head)
    for n, cut in enumerate(cuts.tolist()):
        stepper = TreeStepper(made.engine, 64)
        stepper.prefill(seen.ids[place][None, :cut], None)
        tree = DraftTree((int(seen.ids[place][cut]),), (-1,), (1.0,), probes=part.probes([3]))
        logits = stepper.verify([tree])[0][1:]
        assert torch.allclose(logits.view(2, 3, 64).mean(0), found[n], atol=1e-3)


def test_probes_are_refused_nowhere_they_cannot_run() -> None:
    assert isinstance(prompt_tokens().probes([1]), Probes)
    assert prompt_tokens().probes([0, 0]) is None
