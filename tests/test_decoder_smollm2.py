"""The incremental decoder on the packaged SmolLM2: prefill, steps and rollback within the exact contract, tokens of generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad.estimated_error import allowed_error, relative_error
from subquad.incremental import Decoder, decoder
from subquad.ir.errors import SubquadError
from subquad.verification import graph_output

pytestmark = pytest.mark.slow
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at a lower temperature on a mountain because the air pressure there is lower, and",
)
NEW = 24


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, Decoder, dict[str, torch.Tensor]]:
    """The model in fp32, its tokenizer, its decoder, and the prompts padded on the left."""
    transformers = pytest.importorskip("transformers")
    try:
        directory = subquad.demo_weights()
    except SubquadError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = dict(tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left"))
    fast = subquad.rewrite(model, passes="fuse", verify=False)
    return fast, tokenizer, decoder(fast), inputs


def judged(fast: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The float64 run's logits of real tokens, and the error that the exact contract allows."""
    record = fast.__dict__["_subquad"]
    keep = inputs["attention_mask"].bool()
    judge = graph_output(record.original, inputs)[keep]
    own = graph_output(record.original, inputs, double=False)[keep]
    return judge, allowed_error(relative_error(own, judge), torch.float32)


def stepped(made: Decoder, ids: torch.Tensor, mask: torch.Tensor, cuts: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
    """Logits of every token, a prefill up to the first cut and a step between each two."""
    logits, state = made.prefill(ids[:, : cuts[0]], mask[:, : cuts[0]], last_only=False)
    parts = [logits]
    for begin, end in zip(cuts, (*cuts[1:], ids.shape[1]), strict=True):
        parts.append(made.step(ids[:, begin:end], state))
    return torch.cat(parts, 1), state


def test_prefill_and_steps_of_a_left_padded_batch_keep_the_exact_contract(smollm2: Any) -> None:
    fast, _, made, inputs = smollm2
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert (mask[:, 0] == 0).any()
    judge, allowed = judged(fast, inputs)
    length = ids.shape[1]
    got, _ = stepped(made, ids, mask, (length - 4, length - 3, length - 1))
    assert relative_error(got[mask.bool()], judge) <= allowed


def test_rollback_forgets_what_was_stepped(smollm2: Any) -> None:
    fast, _, made, inputs = smollm2
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    judge, allowed = judged(fast, inputs)
    length = ids.shape[1]
    _, state = made.prefill(ids[:, : length - 3], mask[:, : length - 3])
    made.step((ids[:, :5] + 11) % 1000, state)
    made.rollback(state, 5)
    assert state.length == length - 3
    got = made.step(ids[:, length - 3 :], state)
    wanted = judge.new_zeros(*ids.shape, judge.shape[-1])
    wanted[mask.bool()] = judge
    assert relative_error(got, wanted[:, length - 3 :]) <= 2 * allowed
    assert relative_error(got, wanted[:, length - 4 : length - 1]) > 1000 * allowed


def test_greedy_tokens_are_those_of_generate(smollm2: Any) -> None:
    fast, tokenizer, made, inputs = smollm2
    from subquad.application import original_forward

    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad(), original_forward(fast):
        want = fast.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    got = torch.tensor(list(made.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=NEW))).T
    for prompt, ours, theirs in zip(PROMPTS, got, want, strict=True):
        ended = (theirs == tokenizer.eos_token_id).nonzero()
        stop = int(ended[0]) if len(ended) else len(theirs)
        assert torch.equal(ours[:stop], theirs[:stop]), prompt
    assert "Paris" in tokenizer.decode(got[0])
