"""Drafters that leave the model early: tokens stay those of plain decoding, drafts leave nothing behind, training is of use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from spelled_models import sharp_llama
from test_draft_heads import KNOBS, tokens
from test_drafter_conversion import passes, text

import subquad
from subquad.decoder import Decoder
from subquad.incremental import decoder
from subquad.ir.decoding import Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.ir.errors import ConversionError, GenerationError, PassError
from subquad.ir.trained import Trained, head_digest
from subquad.passes.speculate.early_exit import EarlyExitDrafter, Memory
from subquad.passes.speculate.kangaroo import Kangaroo
from subquad.passes.speculate.s2d import S2D
from subquad.passes.speculate.sorted_exits import Nested
from subquad.passes.speculate.speculate import TRAINED, Speculate
from subquad.passes.speculate.suffix_automaton import SuffixMatch
from subquad.passes.speculate.union import Union
from subquad.runtime.chance import TorchChance, seeded
from subquad.runtime.pacing import FixedPacing
from subquad.runtime.processors import processors
from subquad.runtime.speculation import Ending, speculate
from subquad.runtime.tree_stepper import TreeStepper
from subquad.speculation_words import spoken
from subquad.training.exits import ExitTraining
from subquad.training.foretold import Foretold, written
from subquad.training.recipes import RECIPES, Material
from subquad.training.s2d import block_weights

__all__ = ["text"]
IDS = torch.tensor([[0, 0, 0, 5, 9, 5, 9], [3, 4, 3, 4, 3, 4, 3], [3, 4, 3, 4, 8, 8, 8], [0, 7, 1, 2, 9, 9, 1]])
NAMES = ("kangaroo", "s2d")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def fast() -> Any:
    return subquad.rewrite(sharp_llama(4), passes=["fuse", "speculate"], verify=False)


@pytest.fixture(scope="module")
def made(fast: Any) -> Decoder:
    return decoder(fast)


@pytest.fixture(scope="module")
def seen(made: Decoder) -> Foretold:
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        rows = [torch.randint(1, 64, (16, 6), generator=source).tolist() for _ in range(4)]
        return Foretold.joined([written(made, batch, (), 64) for batch in rows])


@pytest.fixture(scope="module")
def parts(fast: Any, made: Decoder, seen: Foretold) -> dict[tuple[str, str], Any]:
    """Every drafter's parameters, untrained, trained and random, and the losses of the training."""
    found: dict[tuple[str, str], Any] = {}
    for name in NAMES:
        head = made.trained.found_head(name)
        torch.manual_seed(0)
        training = RECIPES[name](Material(fast, made, head, seen), 0)
        assert isinstance(training, ExitTraining)

        def restored(training: ExitTraining = training, name: str = name, head: torch.Tensor = head) -> Any:
            copies = {n: t.clone() for n, t in training.part.parameters_by_name().items()}
            return TRAINED[name].restored(copies, head)

        found[name, "untrained"] = restored()
        training.rate = 3e-3  # few batches
        before = training.guessed()
        losses = [training.work(number) for number in range(training.batches)]
        found[name, "trained"] = restored()
        found[name, "account"] = (before, training.guessed(), losses)
        with torch.no_grad():
            for parameter in training.named.values():
                parameter.copy_(torch.randn_like(parameter))
        found[name, "random"] = restored()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quality", ["untrained", "trained", "random"])
def test_tokens_are_those_of_plain_decoding(made: Decoder, parts: Any, name: str, quality: str) -> None:
    drawn = [(IDS[1:2], KNOBS[4], 0.0), (IDS[2:3], KNOBS[5], 0.6)]
    for ids, knobs, confidence in [(IDS, KNOBS[0], 0.0), (IDS, KNOBS[1], 0.6), (IDS[1:2], KNOBS[2], 0.0), *drawn]:
        drafter = replace(parts[name, quality].drafter(), confidence=confidence)
        assert tokens(made, ids, drafter, knobs)[0] == tokens(made, ids, None, knobs)[0]


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_is_accepted(made: Decoder, parts: Any, name: str) -> None:
    before, after, losses = parts[name, "account"]
    assert all(last < 0.9 * first for first, last in zip(losses[0].values(), losses[-1].values(), strict=True))
    assert all(x > y for x, y in zip(after, before, strict=True))
    source = torch.Generator().manual_seed(9)
    asked = torch.randint(1, 64, (5, 1, 6), generator=source)
    counts = {
        quality: sum(passes(made, replace(parts[name, quality].drafter(), confidence=0.0), one)[1] for one in asked)
        for quality in ("untrained", "trained", "random")
    }
    assert counts["trained"] < 0.9 * counts["untrained"]
    assert counts["trained"] < 0.9 * 5 * 40
    assert counts["random"] > counts["trained"]


@pytest.mark.parametrize("name", NAMES)
def test_a_drafter_goes_on_from_what_others_drafted(made: Decoder, parts: Any, name: str) -> None:
    for ids in (IDS, IDS[1:2]):
        drafter = Union((SuffixMatch(), replace(parts[name, "trained"].drafter(), confidence=0.0)))
        assert tokens(made, ids, drafter, {}, 7)[0] == tokens(made, ids, None, {})[0]


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_share_a_prefix(made: Decoder, parts: Any, name: str) -> None:
    torch.manual_seed(4)
    ids = torch.cat([torch.randint(1, 64, (1, 90)).expand(4, -1), torch.randint(1, 64, (4, 5))], 1)
    stepper = TreeStepper(made.engine, 130)
    stepper.prefill(ids, None)
    assert stepper.state is not None
    assert stepper.state.shared is not None
    drafter = replace(parts[name, "trained"].drafter(), confidence=0.0)
    found, count = tokens(made, ids, drafter, {})
    plain, singly = tokens(made, ids, None, {})
    assert found == plain
    assert count < singly


def drive(made: Decoder, drafter: Any, ids: torch.Tensor, count: int) -> tuple[list[Any], TreeStepper]:
    """The draftings of all rows behind `count` passes, and their stepper."""
    stepper, rows = TreeStepper(made.engine, 64, share=False), []

    class Noting:
        acceptance = drafter.acceptance

        def start(self, given: Any, choice: Choice) -> Any:
            rows.append(drafter.start(given, choice))
            return rows[-1]

    decoding = speculate(
        stepper, ids, (ids != 0).long(), choice=Choice((), True, TorchChance()), plain=drafter.acceptance,
        ending=Ending(30), drafter=Noting(), pacing=FixedPacing(5),
    )  # fmt: skip
    for _ in range(count):
        next(decoding)
    return rows, stepper


@pytest.mark.parametrize("ids", [IDS, IDS[1:2]], ids=["batch", "one"])
def test_what_the_adapter_holds_is_what_the_committed_tokens_give(made: Decoder, parts: Any, ids: torch.Tensor) -> None:
    """Rejected drafts leave nothing: the keys of the adapter and of the model are those of a run over the tokens alone."""
    part = parts["kangaroo", "trained"]
    rows, stepper = drive(made, replace(part.drafter(), confidence=0.0), ids, 6)
    state = stepper.state
    assert state is not None
    for n, row in enumerate(rows):
        first = int((ids[n] == 0).sum())
        committed = state.tokens[made.engine.layout.inputs[0]][n, first : state.lengths[n]].tolist()
        assert row._memory.length == len(committed)
        stream = stepper.own(n).copy(2).run(committed, 0, range(2))
        _, k, v = part.project(stream, 0)
        for own, wanted in zip(row._memory.read(len(committed)), (k, v), strict=True):
            assert torch.allclose(own, wanted, atol=1e-4)
        alone, fresh = TreeStepper(made.engine, 64, share=False), torch.tensor([[0] * first + committed])
        alone.prefill(fresh, (fresh != 0).long())
        assert alone.state is not None
        for mine, theirs in zip(state.k, alone.state.k, strict=True):
            assert torch.allclose(mine[n, first : state.lengths[n]], theirs[0, first : state.lengths[n]], atol=1e-4)


def test_the_first_blocks_are_the_model_s(made: Decoder) -> None:
    """Ahead of the state and with a state of their own, at once and token by token, they give what a pass gives."""
    stepper = TreeStepper(made.engine, 64, share=False)
    stepper.prefill(IDS[1:3], None)
    own = stepper.own(1)
    own.watch(3)
    chain = DraftTree.chain((9, 8, 7))
    ahead = torch.cat([own.ahead((token,), n, 3) for n, token in enumerate(chain.tokens)])
    together = own.ahead(chain.tokens, 0, 3)
    whole = own.copy(3).run([*IDS[2].tolist(), *chain.tokens], 0, range(3))[-3:]
    stepper.verify([DraftTree.chain((1, 2)), chain])
    seen = own.stream(3, range(3))
    for other in (ahead, together, whole):
        assert torch.allclose(seen, other, atol=1e-5)
    split = own.copy(3)
    low = split.run([*IDS[2].tolist(), *chain.tokens], 0, range(1))
    assert torch.allclose(split.run([*IDS[2].tolist(), *chain.tokens], 0, range(1, 3), low)[-3:], seen, atol=1e-5)


def test_a_chain_ends_behind_an_unlikely_token(made: Decoder, parts: Any) -> None:
    part = parts["kangaroo", "trained"]
    (row,), _ = drive(made, replace(part.drafter(), confidence=1.1), IDS[1:2], 3)
    tree = row.propose(5, 5)
    assert len(tree) == 2
    (row,), _ = drive(made, replace(part.drafter(), confidence=0.0, tokens=3), IDS[1:2], 3)
    assert [len(row.propose(*limits)) for limits in ((5, 5), (2, 5), (5, 1), (0, 5))] == [4, 3, 2, 1]


def test_without_a_model_nothing_is_drafted(parts: Any) -> None:
    choice = Choice((), True, seeded(0, torch.device("cpu")))
    for name in NAMES:
        row = parts[name, "trained"].drafter().start((1, 2), choice)
        assert row.propose(4, 4).tokens == (2,)
        row.observe(Verified(DraftTree((2,), (-1,)), (0,), (8,), torch.randn(1, 64)))
        assert row.propose(4, 4).tokens == (8,)


def test_the_memory_grows_and_is_written_over() -> None:
    memory, places = Memory(), torch.randn(2, 3, 700, 4)
    memory.write(0, tuple(places[:, :, :200]))
    memory.write(150, tuple(places[:, :, 150:700]))
    for part, wanted in zip(memory.read(700), places, strict=True):
        assert torch.equal(part, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_sampled_tokens_have_the_law_of_plain_sampling(made: Decoder, parts: Any, name: str) -> None:
    """Two sampled tokens behind a prompt, 900 runs, chi-square against the exact law; false alarm 1 in 10,000."""
    prompt, count = IDS[1:2, :4], 900
    knobs = {"temperature": 25.0, "top_k": 3}
    drafter = replace(parts[name, "trained"].drafter(), confidence=0.0)
    found: dict[tuple[int, ...], int] = {}
    for seed in range(count // 50):
        choice = Choice(processors(**knobs), False, seeded(seed, torch.device("cpu")))
        rows: list[list[int]] = [[] for _ in range(50)]
        for one in made.decode(
            prompt.expand(50, -1), choice=choice, ending=Ending(3), drafter=drafter, pacing=FixedPacing(2), share=False
        ):
            for row, new in zip(rows, one.emitted, strict=True):
                row += [emission.token for emission in new]
        for row in rows:
            found[tuple(row[:2])] = found.get(tuple(row[:2]), 0) + 1
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(2):
        grown: dict[tuple[int, ...], float] = {}
        for path, weight in law.items():
            logits, _ = made.prefill(torch.cat([prompt, torch.tensor([list(path)], dtype=torch.int64)], 1))
            scores = logits[:, -1].float()
            for processor in processors(**knobs):
                scores = processor(prompt, scores)
            for token, chance in enumerate(scores[0].softmax(-1).tolist()):
                if chance > 0:
                    grown[*path, token] = weight * chance
        law = grown
    assert found.keys() <= law.keys()
    square = sum((found.get(path, 0) - count * p) ** 2 / (count * p) for path, p in law.items())
    assert len(law) == 9
    assert square < 31.8  # the quantile 1 − 1e-4 of chi-square with 8 degrees of freedom


def test_the_words_for_it(made: Decoder, parts: Any) -> None:
    head = made.trained.found_head("kangaroo")
    kept = {name: parts[name, "trained"].parameters_by_name() for name in NAMES}
    known = Trained(kept, dict.fromkeys(NAMES, head_digest(head)), head)
    way = spoken({"method": "kangaroo", "confidence": 0.3}, None)
    assert isinstance(way, Speculate)
    drafter = way.drafter(known)
    assert isinstance(drafter, EarlyExitDrafter)
    assert drafter.confidence == 0.3
    for words in ({"method": "kangaroo", "confidence": 1.5}, {"method": "ngram", "confidence": 0.5}):
        with pytest.raises(PassError, match="confidence"):
            spoken(words, None)
    with pytest.raises(GenerationError, match="does not learn while it is used"):
        Speculate(method="kangaroo", online_update_interval=3).drafter(known)
    parts_of_it = Speculate().drafter(known).parts  # type: ignore[attr-defined]
    assert isinstance(parts_of_it[2], EarlyExitDrafter)


def test_parameters_that_do_not_fit_are_refused_in_one_sentence(made: Decoder, parts: Any) -> None:
    kept = parts["kangaroo", "trained"].parameters_by_name()
    head = made.trained.found_head("kangaroo")
    cases = {
        "no kangaroo drafter for a model of width 48": {"ids": torch.arange(3)},
        "instead of one behind a block": kept | {"exits": torch.tensor([0])},
        "proposes token 64, but the model has 64": kept | {"ids": kept["ids"].clone().fill_(64)},
    }
    for words, parameters in cases.items():
        with pytest.raises(GenerationError, match=words) as caught:
            Kangaroo.restored(parameters, head)
        assert "\n" not in str(caught.value)
    late = Kangaroo.restored(kept | {"exits": torch.tensor([4])}, head)
    with pytest.raises(GenerationError, match="behind block 4, but its decoder has 4"):
        tokens(made, IDS[1:2], late.drafter(), {})


@pytest.mark.parametrize("name", NAMES)
def test_an_exit_that_the_decoder_lacks_is_refused_before_anything_is_written(
    name: str, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    from subquad.model_source import open_model

    loaded = open_model(str(tiny_llama), dtype="fp32")
    fast = subquad.rewrite(loaded.module, passes=["fuse", f"speculate(method={name!r}, early_exit=9)"], verify=False)
    with pytest.raises(ConversionError, match="choose another early_exit"):
        subquad.convert(fast, text=text, tokens=600, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_sub_models_agree_with_the_model_they_were_copied_from(made: Decoder, parts: Any) -> None:
    """Untrained blocks and norm: the stream behind an exit is the model's own, whichever exit was asked for the tokens before."""
    part, own = parts["s2d", "untrained"], TreeStepper(made.engine, 64, share=False)
    own.prefill(IDS[1:2], None)
    tokens_, rest = IDS[1].tolist(), [5, 9, 5, 1, 2, 3]
    nested = Nested(own.own(0).copy(2, part.weights), (1, 2))
    whole = own.own(0).copy(2)
    source = torch.Generator().manual_seed(0)
    for token in rest:
        tokens_.append(token)
        deep = bool(torch.rand(1, generator=source) < 0.5)
        found = [nested.read(n, tokens_) for n in range(1 + deep)]
        for n, one in enumerate(found):
            assert torch.allclose(one, whole.run(tokens_, 0, range(n + 1))[-1:], atol=1e-5)
        if token == 5:  # the token is rejected, and another one stands in its place
            nested.cut(len(tokens_) - 1)
            tokens_[-1] = 7
            nested.read(0, tokens_)
    assert nested.done[0] == len(tokens_) >= nested.done[1]
    assert torch.allclose(nested.read(1, tokens_), whole.run(tokens_, 0, range(2))[-1:], atol=1e-5)


def test_the_smallest_exit_that_is_sure_drafts(made: Decoder, parts: Any) -> None:
    part, asked = parts["s2d", "trained"], []
    for confidence in (0.0, 1.1):
        (row,), _ = drive(made, replace(part.drafter(), confidence=confidence), IDS[1:2], 3)
        row.propose(4, 4)
        asked.append(row._nested.done)
    assert asked[0][1] == 0 < asked[0][0]
    assert asked[1][0] == asked[1][1]


def test_a_drafted_token_that_was_cut_off_and_came_after_all_is_read_again(made: Decoder, parts: Any) -> None:
    (row,), _ = drive(made, replace(parts["s2d", "trained"].drafter(), confidence=1.1), IDS[1:2], 2)
    tree = row.propose(4, 4)
    row.observe(Verified(tree.first(2), (0, 1), tree.tokens[1:3], torch.randn(2, 64)))
    again = row.propose(2, 2)
    assert again.tokens == tree.tokens[2:5]


def test_weights_of_other_blocks_are_refused(made: Decoder, parts: Any) -> None:
    head = made.trained.found_head("s2d")
    kept = parts["s2d", "trained"].parameters_by_name()
    name = next(n for n in kept if n.startswith("blocks."))
    for words, parameters in {
        "lacks the weight": {n: t for n, t in kept.items() if n != name},
        "is of shape": kept | {name: torch.zeros(3)},
        "has 9 blocks, but": kept | {"exits": torch.tensor([1, 9])},
    }.items():
        with pytest.raises(GenerationError, match=words):
            tokens(made, IDS[1:2], S2D.restored(parameters, head).drafter(), {})
    with pytest.raises(GenerationError, match="no s2d drafter"):
        S2D.restored(kept | {"exits": torch.tensor([2, 1])}, head)


def small(architecture: str) -> Any:
    """A random model with positions in a table and layer norms, or with windows."""
    import transformers

    torch.manual_seed(0)
    if architecture == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=48, n_layer=3, n_head=4)
    else:
        config = transformers.MistralConfig(
            vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=6, max_position_embeddings=64,
        )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.mul_(1.0 if parameter.dim() == 1 else 8.0)
    return model


@pytest.mark.parametrize("architecture", ["gpt2", pytest.param("mistral", marks=pytest.mark.slow)])
def test_other_architectures(architecture: str) -> None:
    """Blocks are found in the graph, and tokens stay."""
    model = small(architecture)
    one = decoder(subquad.rewrite(model, passes="fuse", verify=False))
    readout = one.engine.readout
    assert readout is not None
    assert one.blocks >= 2
    adapter = Kangaroo(48, torch.arange(64), torch.tensor([1])).begin(readout.weight)
    adapter.out.normal_()
    nested = S2D(48, torch.arange(64), torch.tensor([1, 2]), block_weights(one, 2)).begin(readout.weight)
    for part in (adapter, nested):
        drafter = TRAINED[part.name].restored(part.parameters_by_name(), readout.weight).drafter()
        for ids in (IDS[1:], IDS[1:2]):
            found, count = tokens(one, ids, replace(drafter, confidence=0.0), {})  # type: ignore[type-var]
            plain, singly = tokens(one, ids, None, {})
            assert found == plain
            assert count <= singly


def test_the_norm_begins_at_the_nearest_to_what_the_head_read() -> None:
    part = Kangaroo(48, torch.arange(64), torch.tensor([1]))
    stream, scale, shift = torch.randn(400, 48), torch.randn(48), torch.randn(48)
    stream = stream / stream.square().mean(1, keepdim=True).sqrt()
    part.fit(stream, stream * scale + shift + 0.01 * torch.randn(400, 48))
    assert torch.allclose(part.scale, scale, atol=1e-2)
    assert torch.allclose(part.shift, shift, atol=1e-2)
