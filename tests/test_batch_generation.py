"""Prompts of a file answered together: the tokens of each alone, what was shared drawn, and mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import subquad
from subquad.batch_generation import generate_answers
from subquad.cli.ending import run
from subquad.ir.errors import GenerationError
from subquad.model_source import LoadedModel, open_model
from subquad.text_generation import Sampling, generate_text, open_for_generation

SYSTEM = (
    "You answer in one word, without a reason, and never in more than one sentence, whatever you are asked here. " * 3
)
PROMPTS = [SYSTEM + tail for tail in ("red", "blue or green", "why", "where is it")] + ["something else"]


@pytest.fixture(scope="module")
def exact(tiny_llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exact") / "out"
    return subquad.save(subquad.rewrite(open_model(str(tiny_llama_source)).module, verify=False), out)


@pytest.fixture(scope="module")
def loaded(exact: Path) -> LoadedModel:
    return open_for_generation(str(exact))


@pytest.mark.parametrize("share", [True, False])
def test_each_answer_is_that_of_its_prompt_alone(loaded: LoadedModel, share: bool) -> None:
    sampling = Sampling(max_new_tokens=7)
    found = generate_answers(loaded, PROMPTS, sampling, raw=True, batch=4, share=share)
    for prompt, tokens, text in zip(PROMPTS, found.tokens, found.texts, strict=True):
        one = generate_text(loaded, prompt, sampling, raw=True, engine="subquad")
        assert (tokens, text) == (one.tokens, one.text)
    first, second = found.sharing
    assert (first.sharing is not None) is share
    assert second.why_not == ("there is one row" if share else "sharing was turned off")


def test_the_tree_is_drawn_and_reported(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    options = ["generate", str(exact), "--prompts", str(path), "--raw", "--max-new-tokens", "3", "--no-compile"]
    assert run(options) == 0
    shown = capsys.readouterr()
    assert [line.partition(" ")[0] for line in shown.out.splitlines() if line.startswith("[")] == [
        f"[{n}]" for n in range(1, 6)
    ]
    assert "tokens of 4 prompts" in shown.err
    assert "You answer in one word" in shown.err
    assert "1 prompts share too little" in shown.err
    assert run([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["sharing"][0]
    assert report["saved"] == report["tokens"] - report["computed"] > 0
    assert report["nodes"][0]["prompts"] == [0, 1, 2, 3]
    assert run([*options, "--no-share"]) == 0
    assert "nothing was shared: sharing was turned off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give --prompt TEXT or --prompts FILE"),
        (["--prompts", "no such file"], "cannot be read"),
        (["--prompts", "x", "--engine", "transformers"], "runs on subquad's decoder"),
    ],
    ids=["neither", "missing", "engine"],
)
def test_mistakes(exact: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(exact), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_an_empty_prompt_is_named(loaded: LoadedModel) -> None:
    with pytest.raises(GenerationError, match="prompt 2 is empty"):
        generate_answers(loaded, ["a", ""], Sampling(), raw=True)
