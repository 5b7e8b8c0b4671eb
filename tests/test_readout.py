"""The head of logits is found, and what it reads, where the last norm adds to its weight and the logits are capped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import subquad
from subquad.incremental import decoder

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def gemma(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)).eval()
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)).eval()


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_what_the_head_reads_gives_the_logits(kind: str) -> None:
    model = gemma(kind)
    with torch.no_grad():
        model.model.norm.weight.normal_()
    ids = torch.randint(3, 48, (1, 6))
    made = decoder(subquad.rewrite(model, passes="fuse", example_inputs={"input_ids": ids, "use_cache": False}))
    readout = made.engine.readout
    assert readout is not None
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    _, state = made.prefill(ids[:, :5])
    logits, stream = made.verify(ids[:, 5:], state)
    logits, stream = logits.clone(), stream.clone()
    torch.testing.assert_close(logits[:, -1], want[:, -1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        found = readout.reads(stream) @ readout.weight.T
    capped = torch.tanh(found / 0.5) * 0.5 if kind == "gemma2" else found
    torch.testing.assert_close(capped, want[:, -1], rtol=1e-4, atol=1e-5)
