"""Bad prompts, lengths and numbers through every door: what the original gives, or one sentence, and nothing half done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from spelled_models import tiny_llama as made
from test_carried_draft import LENGTH, Cycle, Loop, arguments, drafting

import subquad
from subquad.cli.ending import run
from subquad.ir.errors import GenerationError

WINDOW = 32
PROMPTS = {
    "beyond the window": (torch.arange(40)[None] % 60, 5),
    "past the window on the way": (torch.arange(28)[None] % 60, 10),
    "one token": (torch.tensor([[7]]), 1),
}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    model = made(1, max_position_embeddings=WINDOW)
    model.generation_config.pad_token_id = 0
    return copy.deepcopy(model), subquad.rewrite(model, passes="speculate", verify=False)


@pytest.mark.parametrize("name", PROMPTS)
def test_generate_gives_what_the_original_gives(pair: tuple[Any, Any], name: str) -> None:
    ids, count = PROMPTS[name]
    want, got = (model.generate(ids, max_new_tokens=count, do_sample=False) for model in pair)
    assert torch.equal(got, want)


def test_generate_refuses_an_empty_prompt_as_the_original_does(pair: tuple[Any, Any]) -> None:
    said = []
    for model in pair:
        with pytest.raises(RuntimeError) as caught:
            model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=3, do_sample=False)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_generate_says_that_scores_are_no_numbers(pair: tuple[Any, Any]) -> None:
    broken = copy.deepcopy(pair[1])
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    for sampled in (False, True):
        with pytest.raises(GenerationError, match="hold NaN"):
            broken.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=sampled)


def greedy(model: Any, ids: torch.Tensor, count: int = 12) -> torch.Tensor:
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_a_decorated_loop_names_a_drafter_that_was_not_trained_for_its_model() -> None:
    fast = subquad.rewrite(passes="speculate(method=medusa)")(greedy)
    with torch.no_grad(), pytest.raises(GenerationError, match="has no trained medusa drafter"):
        fast(made(1), torch.tensor([[5, 6, 7]]))


def test_a_loop_in_a_program_at_the_ends_of_its_buffer() -> None:
    loop = Loop(Cycle())
    fast, plain = (
        drafting(loop),
        torch.export.export(loop.eval(), arguments(torch.ones(1, 3).long(), 9), strict=False).module(),
    )
    with torch.no_grad():
        for length, end in ((1, 0), (1, 1), (1, 2), (LENGTH - 1, LENGTH), (LENGTH, LENGTH), (4, LENGTH)):
            given = arguments(torch.arange(length)[None] % 7, end)
            for one, other in zip(plain(*(x.clone() for x in given)), fast(*(x.clone() for x in given)), strict=True):
                assert torch.equal(one, other)


def test_a_loop_in_a_program_chooses_from_scores_that_are_no_numbers_as_before() -> None:
    torch.manual_seed(0)
    model = Cycle()
    with torch.no_grad():
        model.table.weight[4] = torch.nan
    loop = Loop(model, stops=False)
    fast, plain = (
        drafting(loop),
        torch.export.export(loop.eval(), arguments(torch.ones(1, 3).long(), 9), strict=False).module(),
    )
    given = arguments(torch.tensor([[1, 2, 1, 2, 3]]), LENGTH)
    with torch.no_grad():
        for one, other in zip(plain(*(x.clone() for x in given)), fast(*(x.clone() for x in given)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", "", "--raw", "--max-new-tokens", "3"), "prompt"),
        (("--prompt", "hello", "--max-new-tokens", "0"), "max-new-tokens"),
    ],
)
def test_the_command_says_one_sentence(
    tiny_llama: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(["generate", str(tiny_llama), *options])
    printed = capsys.readouterr()
    assert status == 2
    assert said in printed.err
    assert "Traceback" not in printed.err
