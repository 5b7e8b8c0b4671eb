"""convert trains a drafter's heads on what the model foretells: aligned, kept, stored, loaded again, and of use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from spelled_models import sharp_llama

import subquad
from subquad import conversion
from subquad.application import rewritten
from subquad.artifact_directory import stored_decoder
from subquad.decoder import Decoder
from subquad.drafter_file import NAME, read_drafters
from subquad.incremental import decoder
from subquad.ir.decoding import Choice, Drafter
from subquad.ir.errors import ArtifactError, ConversionError, GenerationError
from subquad.model_source import open_model
from subquad.passes.speculate.head_drafts import HeadDrafter
from subquad.passes.speculate.speculate import HEADS, TRAINED
from subquad.runtime.chance import TorchChance
from subquad.runtime.pacing import FixedPacing
from subquad.runtime.speculation import Ending
from subquad.speculation_words import spoken
from subquad.text_generation import Sampling, decoder_of, generate_text, open_for_generation
from subquad.training import foretold_text
from subquad.training.foretold import Foretold, read, written
from subquad.training.heads import HeadTraining, frequent
from subquad.training.session import Session
from subquad.training.settings import Settings

PROMPT = torch.tensor([[5, 9, 5, 9, 7]])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{n} times {n} makes {n * n}, as all know.\n" for n in range(200)))
    return path


def drafting(directory: Path, method: str = "hydra") -> Any:
    loaded = open_model(str(directory), dtype="fp32")
    return subquad.rewrite(loaded.module, passes=["fuse", f"speculate(method={method!r})"], verify=False)


def passes(made: Decoder, drafter: Drafter | None, prompt: torch.Tensor = PROMPT) -> tuple[list[int], int]:
    tokens: list[int] = []
    count = 0
    for one in made.decode(
        prompt, choice=Choice((), True, TorchChance()), ending=Ending(40), drafter=drafter, pacing=FixedPacing(3)
    ):
        tokens += [emission.token for emission in one.emitted[0]]
        count += 1
    return tokens, count


def test_what_is_foretold_stands_beside_its_token() -> None:
    model = sharp_llama(2)
    made = decoder(subquad.rewrite(model, passes="fuse", verify=False))
    rows = [[3, 4, 5], [7, 8, 9, 10, 11]]
    with torch.no_grad():
        found = written(made, rows, (), 6)
        alone = [model.generate(torch.tensor([row]), max_new_tokens=7, do_sample=False)[0] for row in rows]
        whole = [answer.tolist() for answer in alone]
        assert [found.ids[place].tolist() for place in found.sequences()] == [answer[:-1] for answer in whole]
        assert [found.wanted[place].tolist() for place in found.sequences()] == [answer[1:] for answer in whole]
        assert found.left.tolist() == [*range(8, -1, -1), *range(10, -1, -1)]
        assert found.asked.tolist() == [True] * 3 + [False] * 6 + [True] * 5 + [False] * 6
        assert len(found) == 12
        logits = torch.cat([model(answer[None, :-1]).logits[0] for answer in alone])
        assert torch.allclose(found.hidden @ model.lm_head.weight.T, logits, atol=1e-3)
        end = int(alone[0][5])
        ended = written(made, rows, (end,), 6)
        first = ended.sequences()[0]
        assert end not in ended.ids[first][3:]
        assert ended.ids[first].tolist() == whole[0][:5]
        assert ended.wanted[first][-1] == end
        ids = torch.randint(0, 64, (12,))
        seen = read(made, ids.tolist())
        logits = model(ids[None]).logits[0]
    assert torch.equal(seen.ids, ids[1:])
    assert torch.equal(seen.wanted, logits[1:].argmax(-1))
    assert torch.allclose(seen.hidden @ model.lm_head.weight.T, logits[1:], atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("chimera", "falcon", "kangaroo") else ())
        for name in sorted({*TRAINED} - {"medusa"})
    ],
)
def test_a_drafter_is_trained_stored_loaded_and_accepted(
    tiny_llama: Path, text: Path, tmp_path: Path, name: str
) -> None:
    fast = drafting(tiny_llama, name)
    with pytest.raises(GenerationError, match=f"no trained {name} drafter"):
        fast.generate(PROMPT, max_new_tokens=4)
    before = {name: p.detach().clone() for name, p in fast.named_parameters()}
    out = tmp_path / "out"
    assert subquad.convert(fast, text=text, tokens=2000, out=out) is fast
    assert all(torch.equal(p, before[name]) for name, p in fast.named_parameters())
    account = json.loads((out / "conversion.json").read_text())["stages"]
    assert [stage["stage"] for stage in account] == [name]
    assert account[0]["tokens"] >= 2000
    assert account[0]["guessed"]
    assert not list(tmp_path.glob("*.unfinished"))
    with safe_open(str(out / NAME), framework="pt") as stored:
        assert all(full.startswith(f"{name}.") for full in stored.keys())  # noqa: SIM118
    knobs = spoken({"method": name}, None)
    assert knobs is not None
    found = []
    for made in (decoder_of(fast), decoder_of(subquad.load(out)), stored_decoder(out)):
        assert made is not None
        assert made.speculation is not None
        assert made.speculation.trains == name
        found.append(passes(made, made.drafter(knobs)))
    plain = passes(decoder_of(fast), None)
    assert found[0] == found[1] == found[2]
    assert found[0][0] == plain[0]
    assert found[0][1] <= plain[1]
    assert torch.equal(
        fast.generate(PROMPT, max_new_tokens=30), fast.generate(PROMPT, max_new_tokens=30, method="none")
    )
    answer = generate_text(open_for_generation(str(out)), "3 times 3", Sampling(20))
    assert answer.mean_accepted >= 1


@pytest.mark.parametrize("name", sorted(HEADS))
def test_what_was_learnt_is_accepted(name: str) -> None:
    """Prompts that were not among those of the training; untrained heads, which repeat the model's last token, accept less."""
    made = decoder(subquad.rewrite(sharp_llama(2), passes="fuse", verify=False))
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        seen = [written(made, torch.randint(1, 64, (16, 6), generator=source).tolist(), (), 64) for _ in range(4)]
        head = made.trained.found_head(name)
        heads = HEADS[name](48, frequent(seen[0].wanted, 99), 48, 4).fitted(head)
        counts = {"untrained": HEADS[name].restored(heads.parameters_by_name(), head)}
        training = HeadTraining(heads, Foretold.joined(seen))
        for number in range(training.batches):
            training.work(number)
        counts["trained"] = HEADS[name].restored(heads.parameters_by_name(), head)
        asked = torch.randint(1, 64, (5, 1, 6), generator=source)
        found = {
            word: sum(passes(made, HeadDrafter(one), prompt)[1] for prompt in asked) for word, one in counts.items()
        }
    assert found["trained"] < 0.9 * 5 * 40
    assert found["trained"] < found["untrained"]


def test_what_the_model_wrote_is_kept(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = drafting(tiny_llama, "medusa")
    subquad.convert(fast, text=text, tokens=600, out=tmp_path / "one")

    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(foretold_text, "read", never)
    monkeypatch.setattr(foretold_text, "written", never)
    again = drafting(tiny_llama, "medusa")
    subquad.convert(again, text=text, tokens=600, out=tmp_path / "two")
    one, two = (read_drafters(tmp_path / name).parameters["medusa"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_drafter_for_another_model_is_refused(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    fast = drafting(tiny_llama)
    subquad.convert(fast, text=text, tokens=600, out=tmp_path / "out")
    record = rewritten(fast)
    assert record is not None
    torch.manual_seed(5)
    other = drafting(tiny_llama)
    with torch.no_grad():
        other.lm_head.weight.normal_()
    rewritten(other).trained = record.trained  # type: ignore[union-attr]
    with pytest.raises(GenerationError, match="for another model or vocabulary"):
        other.generate(PROMPT, max_new_tokens=4)
    (tmp_path / "out" / NAME).write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="is damaged"):
        stored_decoder(tmp_path / "out")


def test_a_text_that_is_too_short_is_refused_and_nothing_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A line that is long enough to ask.\n" * 9)
    with pytest.raises(ConversionError, match="give a longer text") as caught:
        subquad.convert(drafting(tiny_llama), text=tmp_path / "short.txt", tokens=9000, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConversionError, match="does not exist"):
        subquad.convert(drafting(tiny_llama), text=tmp_path / "none.txt", tokens=9000, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_attention_and_drafter_are_trained_in_one_call(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loaded = open_model(str(tiny_llama), dtype="fp32")
    wanted = ["linearize:lolcats(window=4, sinks=1, features=8)", "speculate(method='medusa')"]
    fast = subquad.rewrite(loaded.module, passes=wanted, verify=False)
    subquad.convert(fast, text=text, tokens=8000, out=tmp_path / "out")
    stages = [stage["stage"] for stage in fast.report.conversion]  # type: ignore[union-attr]
    assert stages == ["before", "transfer", "adapters", "medusa"]
    made = stored_decoder(tmp_path / "out")
    assert made is not None
    assert made.trained.parameters.keys() == {"medusa"}


@pytest.mark.parametrize(
    "name", ["ppd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hydra", "falcon", "kangaroo", "s2d"))]
)
def test_an_interruption_leaves_the_model_as_it_was_and_goes_on_to_the_same_end(
    tiny_llama: Path, text: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drafting(tiny_llama, name)
    subquad.convert(whole, text=text, tokens=900, out=tmp_path / "whole")
    fast, work = drafting(tiny_llama, name), Session.run

    def interrupted(self: Session, stage: str, title: str, batches: int, size: int, do: Any, tensors: Any) -> None:
        def once(number: int) -> dict[str, float]:
            self._stop = number == batches // 2
            return do(number)  # type: ignore[no-any-return]

        work(self, stage, title, batches, size, once, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "run", interrupted)
        with pytest.raises(ConversionError, match=f"interrupted after batch .* of the {name} drafter"):
            subquad.convert(fast, text=text, tokens=900, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(GenerationError, match=f"no trained {name} drafter"):
        fast.generate(PROMPT, max_new_tokens=4)
    subquad.convert(fast, text=text, tokens=900, out=tmp_path / "out")
    one, two = (read_drafters(tmp_path / folder).parameters[name] for folder in ("whole", "out"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("fails", ["convert_drafter", "save"])
def test_attention_that_was_trained_is_put_back_when_what_follows_fails(
    tiny_llama: Path, text: Path, tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    loaded = open_model(str(tiny_llama), dtype="fp32")
    wanted = ["linearize:lolcats(window=4, sinks=1, features=8)", "speculate(method='medusa')"]
    fast = subquad.rewrite(loaded.module, passes=wanted, verify=False)
    before = {name: p.detach().clone() for name, p in fast.named_parameters()}

    def failing(*_: Any, **__: Any) -> None:
        moved = [n for n, p in fast.named_parameters() if not torch.equal(p, before[n])]
        assert any("o_proj" in n for n in moved)
        assert len(moved) > 8
        raise ConversionError("interrupted")

    monkeypatch.setattr(conversion, fails, failing)
    quick = Settings(tokens=2048, length=64, rows=2, transfer_rows=2, held_out=128)
    if fails == "save":
        monkeypatch.setattr(conversion, "convert_drafter", lambda *_, **__: {"stage": "medusa"})
    with pytest.raises(ConversionError, match="interrupted"):
        subquad.convert(fast, text=text, tokens=4096, out=tmp_path / "out", settings=quick)
    assert all(torch.equal(p, before[name]) for name, p in fast.named_parameters())
    assert fast.report.conversion == []  # type: ignore[union-attr]
