"""Drafters with a context: what they draft is what they were trained to, nothing drafted stays in them, tokens stay plain."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from spelled_models import sharp_llama
from test_draft_heads import IDS, KNOBS, tokens

import subquad
from subquad.decoder import Decoder
from subquad.incremental import decoder
from subquad.ir.decoding import Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError
from subquad.ir.trained import Trained, head_digest
from subquad.passes.speculate.context_heads import ContextDrafter, ContextHeads
from subquad.passes.speculate.falcon import Falcon
from subquad.passes.speculate.speculate import TRAINED, Speculate
from subquad.runtime.chance import seeded
from subquad.runtime.tree_stepper import TreeStepper
from subquad.training.foretold import Foretold, written
from subquad.training.recipes import RECIPES, Material

NAMES = sorted(name for name, kind in TRAINED.items() if issubclass(kind, ContextHeads))
PLAIN = Choice((), True, seeded(0, torch.device("cpu")))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made() -> Decoder:
    return decoder(subquad.rewrite(sharp_llama(2), passes="fuse", verify=False))


def kind(name: str) -> type[ContextHeads]:
    found = TRAINED[name]
    assert issubclass(found, ContextHeads)
    return found


def heads(name: str, head: torch.Tensor, noise: float = 0.05) -> Any:
    torch.manual_seed(1)
    one = kind(name)(head.shape[1], torch.arange(1, 64, 2), 16, 4).fitted(head)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return kind(name).restored(one.parameters_by_name(), head)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", [0.0, 0.05, 3.0], ids=["untrained", "moved", "adversarial"])
def test_tokens_are_those_of_plain_decoding(made: Decoder, name: str, noise: float) -> None:
    head = made.trained.found_head(name)
    four = torch.cat([IDS, IDS[1:2].flip(1)])
    for ids, knobs, nodes in itertools.product((four, IDS[1:2]), (*KNOBS[:2], KNOBS[4]), (2, 7)):
        if knobs.get("temperature") and len(ids) > 1:
            continue
        drafter = ContextDrafter(heads(name, head, noise), least=0.0)
        assert tokens(made, ids, drafter, knobs, nodes)[0] == tokens(made, ids, None, knobs)[0]


@pytest.mark.parametrize("name", NAMES)
def test_only_what_was_committed_stays(name: str) -> None:
    """After drafting and a rejection the context guesses as one does that never drafted."""
    head = torch.randn(64, 48)
    one = heads(name, head)
    read, more = torch.randn(6, 48), torch.randn(3, 48)
    drafting, other = ContextDrafter(one, least=0.0).start((3, 4, 3, 4, 5, 6, 7), PLAIN), one.opened()
    drafting.read(read)
    other.add([3, 4, 3, 4, 5, 6], read)
    tree = drafting.propose(6, 4)
    assert len(tree) == 7
    path = (0, tree.children[0][-1])
    result = (tree.tokens[path[1]], 9)
    drafting.observe(Verified(tree, path, result, torch.randn(len(tree), 64), lambda nodes: more[: len(nodes)]))
    other.add([7, result[0]], more[:2])
    with torch.inference_mode():
        guess, want = drafting.context.guesses(9), other.guesses(9)
        for level in range(4):
            paths = torch.randint(0, 64, (3, level))
            assert torch.allclose(guess(level, paths), want(level, paths), atol=1e-5)
    assert drafting.propose(6, 4).tokens[0] == 9


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_guessed_alike_alone_and_together(name: str) -> None:
    one = heads(name, torch.randn(64, 48))
    context = one.opened()
    context.add([3, 4, 5, 6], torch.randn(4, 48))
    together, alone = context.guesses(8), context.guesses(8)
    assert together is not None
    assert alone is not None
    for level in range(4):
        paths = torch.randint(0, 64, (5, level))
        found = together(level, paths)
        for n in range(5):
            assert torch.allclose(alone(level, paths[n : n + 1])[0], found[n], atol=1e-4)


def test_the_prompt_is_read_where_it_is_not_shared(made: Decoder) -> None:
    readout = made.engine.readout
    assert readout is not None
    ids, mask = IDS, (IDS != 0).long()
    stepper = TreeStepper(made.engine, 64, share=False)
    last = stepper.prefill(ids, mask)
    found = [stepper.read(row) for row in range(3)]
    assert [None if one is None else len(one) for one in found] == [4, 7, 7]
    for one, logits in zip(found, last, strict=True):
        assert one is not None
        assert torch.allclose(one[-1] @ readout.weight.T, logits, atol=1e-3)
    stepper.verify([DraftTree((7,), (-1,)), None, None])
    assert stepper.read(0) is None


def test_chimera_drafts_as_it_was_trained() -> None:
    one = heads("chimera", torch.randn(64, 48))
    hidden, ids = torch.randn(1, 9, 48), torch.randint(0, 64, (1, 9))
    found, context = one.along(hidden, ids), one.opened()
    context.add(ids[0, :5].tolist(), hidden[0, :5])
    guess = context.guesses(int(ids[0, 5]))
    for level in range(4):
        want = one.words(one.features(level, hidden[:, 4], found[:, 4, level]))
        assert torch.allclose(guess(level, ids[:, 6 : 6 + level]), want, atol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("length", [5, 6, 7])
def test_falcon_drafts_as_it_was_trained(block: int, length: int) -> None:
    head = torch.randn(64, 48)
    made = Falcon(48, torch.arange(1, 64, 2), 16, 4, block).fitted(head)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    one = Falcon.restored(made.parameters_by_name(), head)
    assert one.k == block
    hidden, ids = torch.randn(1, length, 48), torch.randint(0, 64, (1, length + 1))
    found, context = one.along(hidden, ids[:, 1:], length % block), one.opened()
    context.add(ids[0, :2].tolist(), hidden[0, :2])
    context.add(ids[0, 2:-1].tolist(), hidden[0, 2:])
    guess = context.guesses(int(ids[0, -1]))
    assert guess is not None
    for level in range(block):
        paths = torch.randint(0, 64, (2, level))
        assert torch.allclose(guess(level, paths)[1], one.words(found[0, length - block + level]), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_guesses_about_the_same(name: str) -> None:
    head, read = torch.randn(64, 48).bfloat16(), torch.randn(5, 48).bfloat16()
    half, whole = heads(name, head), heads(name, head.float())
    found = []
    for one in (half, whole):
        context = one.opened()
        context.add([3, 4, 5], read[:3].to(one.words.weight.dtype))
        context.add([8, 9], read[3:].to(one.words.weight.dtype))
        guess = context.guesses(7)
        found.append(torch.cat([guess(level, torch.tensor([[5, 9, 11]])[:, :level]) for level in range(4)]))
    assert found[0].dtype == torch.bfloat16
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_do_not_fit_are_refused(name: str) -> None:
    head = torch.randn(64, 48)
    kept = {name: heads(name, head).parameters_by_name()}
    digest = {name: head_digest(head)}
    assert isinstance(Speculate(method=name).drafter(Trained(kept, digest, head)), ContextDrafter)
    cases = {
        f"no trained {name} drafter": Trained({}, {}, head),
        "for another model": Trained(kept, digest, torch.randn(64, 48)),
        f"are no {name} heads": Trained({name: {"ids": torch.arange(3)}}, digest, head),
        "has 64 tokens": Trained({name: kept[name] | {"ids": torch.arange(63, 95)}}, digest, head),
    }
    for words, trained in cases.items():
        with pytest.raises(GenerationError, match=words):
            Speculate(method=name).drafter(trained)
    with pytest.raises(GenerationError, match="does not learn while it is used"):
        Speculate(method=name, online_update_interval=4).drafter(Trained(kept, digest, head))


@pytest.mark.parametrize("name", NAMES)
def test_what_was_learnt_is_accepted(name: str) -> None:
    """Prompts that were not among those of the training; the loss falls, and passes get fewer than without training."""
    model = subquad.rewrite(sharp_llama(2), passes="fuse", verify=False)
    made = decoder(model)
    source = torch.Generator().manual_seed(3)
    seen = [written(made, torch.randint(1, 64, (16, 6), generator=source).tolist(), (), 64) for _ in range(4)]
    head = made.trained.found_head(name)
    training: Any = RECIPES[name](Material(model, made, head, Foretold.joined(seen)), 0)
    before = kind(name).restored(training.part.parameters_by_name(), head).drafter()
    losses = [training.work(number)["loss"] for number in range(training.batches)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    after = kind(name).restored(training.part.parameters_by_name(), head).drafter()
    asked = torch.randint(1, 64, (5, 1, 6), generator=source)
    untrained, trained = (sum(tokens(made, ids, one, {})[1] for ids in asked) for one in (before, after))
    assert trained < 0.9 * 5 * 20
    assert trained < untrained
    assert len(training.guessed()) == 4
