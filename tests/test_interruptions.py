"""What ends a generation early: stop strings that cross tokens, and Ctrl-C while text is streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import subquad
from subquad.application import original_forward
from subquad.model_source import open_model
from subquad.text_generation import Sampling, generate_text


def test_stop_strings_across_tokens_end_where_the_original_ends(tiny_llama: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    fast = subquad.rewrite(open_model(str(tiny_llama)).module, passes="speculate", verify=False)
    ids = torch.tensor([tokenizer.encode("hello hello")])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with original_forward(fast):
        whole = fast.generate(ids, **options)[0, ids.shape[1] :]
    found = 0
    for begin in range(2, 14, 3):
        stop = tokenizer.decode(whole[begin : begin + 2])
        if len(stop) < 2 or "�" in stop:
            continue
        with original_forward(fast):
            want = fast.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)
        got = fast.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)
        assert torch.equal(got, want)
        assert fast.generate.why_not is None
        found += want.shape[1] < ids.shape[1] + 24
    assert found


def test_ctrl_c_keeps_what_was_decoded(tiny_llama: Path) -> None:
    loaded = open_model(str(tiny_llama))
    loaded.module = subquad.rewrite(loaded.module, passes="speculate", verify=False)
    whole = generate_text(loaded, "hello", Sampling(24))
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    cut = generate_text(loaded, "hello", Sampling(24), on_text=show)
    assert cut.interrupted
    assert not whole.interrupted
    assert 0 < len(cut.tokens) < len(whole.tokens)
    assert whole.text.startswith(cut.text)
    assert cut.json()["interrupted"] is True
    assert any("interrupted" in note for note in cut.notes)


@pytest.mark.parametrize("method", ["none", "auto", "ngram"])
def test_a_method_may_be_named_for_a_generation(tiny_llama: Path, method: str) -> None:
    loaded = open_model(str(tiny_llama))
    plain = generate_text(loaded, "abcabcabc", Sampling(24), engine="transformers")
    loaded.module = subquad.rewrite(loaded.module, passes="fuse", verify=False)
    found = generate_text(loaded, "abcabcabc", Sampling(24, speculation={"method": method}))
    assert found.engine == "subquad"
    assert found.tokens == plain.tokens
    assert found.rows_per_step >= 1
    assert found.mean_accepted >= 1
    assert method != "none" or found.rows_per_step == 1
