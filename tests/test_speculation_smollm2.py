"""Speculation on the packaged SmolLM2 in float32: the tokens of the original's generate, for every drafter, batch and penalty."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import subquad
from subquad.application import original_forward
from subquad.ir.errors import SubquadError

pytestmark = pytest.mark.slow
PROMPTS = (
    "The capital of France is",
    "Repeat after me: one two three one two three one two three one two",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at a lower temperature on a mountain because the air pressure there is lower, and",
)
MARGIN = 1e-3
"""A difference is a failure only where the float64 run's two best scores lie further apart."""


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, Any]:
    """The rewritten model, its tokenizer, and a float64 copy that judges differences."""
    transformers = pytest.importorskip("transformers")
    try:
        directory = subquad.demo_weights()
    except SubquadError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    judge = copy.deepcopy(model).double()
    return subquad.rewrite(model, passes=["fuse", "speculate"], verify=False), tokenizer, judge


def judged(judge: Any, prompt: torch.Tensor, want: list[int], got: list[int], penalty: float) -> None:
    """Equal, or different for the first time where float64 sees a tie within the margin."""
    if want == got:
        return
    place = next(
        (n for n, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]), min(len(want), len(got))
    )
    ids = torch.cat([prompt, torch.tensor(want[:place], dtype=prompt.dtype)])[None]
    with torch.no_grad():
        scores = judge(ids).logits[:, -1]
    if penalty != 1:
        seen = scores.gather(1, ids)
        scores = scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
    best = scores[0].topk(2).values
    assert float(best[0] - best[1]) <= MARGIN, (place, want[place : place + 3], got[place : place + 3])


@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("method", ["auto", "suffix", "ngram", "recycling", "trigram"])
def test_tokens_are_those_of_generate(smollm2: Any, method: str, penalty: float) -> None:
    fast, tokenizer, judge = smollm2
    together = dict(tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left"))
    alone = [dict(tokenizer([prompt], return_tensors="pt")) for prompt in PROMPTS]
    options = {
        "max_new_tokens": 48,
        "do_sample": False,
        "repetition_penalty": penalty,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for inputs in (together, *alone):
        width = inputs["input_ids"].shape[1]
        with original_forward(fast):
            want = fast.generate(**inputs, **options)
        got = fast.generate(**inputs, **options, method=method)
        assert fast.generate.why_not is None
        for ids, mask, ours, theirs in zip(inputs["input_ids"], inputs["attention_mask"], got, want, strict=True):
            judged(judge, ids[mask != 0], theirs[width:].tolist(), ours[width:].tolist(), penalty)
