"""A draft model with another tokenizer: letters beside pairs of letters; tokens and laws stay, what agrees is accepted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from enumeration import law_of, variation
from prefix_model import PrefixStepper, random_model
from test_speculation import KNOBS, run

from subquad.passes.speculate.other_tokenizer import OtherTokenizer

LETTERS = "abcdefgh"


class Letters:
    """One id a letter, from `shift` on."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) + self.shift for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[(id_ - self.shift) % 8] for id_ in ids)


class Pairs:
    """One id for two letters, from the left; the last of an odd number alone."""

    def encode(self, text: str) -> list[int]:
        parts = [text[n : n + 2] for n in range(0, len(text), 2)]
        return [LETTERS.index(p[0]) * 9 + (LETTERS.index(p[1]) if len(p) > 1 else 8) for p in parts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[id_ // 9] + (LETTERS[id_ % 9] if id_ % 9 < 8 else "") for id_ in ids)


def cycle(prefix: Sequence[int]) -> torch.Tensor:
    """Letters in alphabetical order, round and round."""
    return 9.0 * torch.eye(8)[(prefix[-1] + 1) % 8]


def cycle_of_pairs(prefix: Sequence[int]) -> torch.Tensor:
    last = prefix[-1] % 9 if prefix[-1] % 9 < 8 else prefix[-1] // 9
    return 9.0 * torch.eye(72)[(last + 1) % 8 * 9 + (last + 2) % 8]


DRAFTERS = {
    "right": lambda: OtherTokenizer(lambda: PrefixStepper(cycle_of_pairs), Letters(), Pairs(), 8, tokens=3),
    "random": lambda: OtherTokenizer(lambda: PrefixStepper(random_model(5, 72)), Letters(), Pairs(), 8),
    "unknown ids": lambda: OtherTokenizer(lambda: PrefixStepper(random_model(5, 8)), Letters(8), Letters(), 8),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_tokens_are_those_of_plain_decoding(name: str) -> None:
    four = torch.tensor([[0, 0, 4, 2], [1, 2, 3, 4], [0, 5, 5, 5], [6, 1, 6, 1]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    for forward, (ids, keep), knobs in itertools.product(
        (cycle, random_model(3, memory=2)), ((four[1:2], None), (four, mask)), KNOBS[:4]
    ):
        options = {"ids": ids, "mask": keep, "knobs": knobs, "count": 14}
        assert run(forward, DRAFTERS[name](), **options)[0] == run(forward, **options)[0]


def test_text_that_agrees_is_accepted_through_both_tokenizers() -> None:
    prompt = torch.tensor([[0, 1, 2, 3]])
    got, stepper = run(cycle, DRAFTERS["right"](), ids=prompt, count=25)
    assert got == run(cycle, ids=prompt, count=25)[0]
    assert stepper.passes <= 8


def test_sampled_tokens_have_the_law_of_plain_sampling() -> None:
    forward = random_model(21, 8, memory=2)
    knobs = {"temperature": 0.7, "top_k": 2}
    laws = [
        law_of(lambda chance, d=drafter: tuple(run(forward, d and d(), chance=chance, knobs=knobs, count=4)[0][0]))
        for drafter in (None, DRAFTERS["random"])
    ]
    assert variation(*laws) < 1e-12
