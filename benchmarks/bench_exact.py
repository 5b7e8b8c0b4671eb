"""The exact rewrite on real text: errors against a float64 run in fp32 and bf16, and greedy tokens on real prompts."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import machine
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import subquad
from subquad.application import original_forward
from subquad.estimated_error import allowed_error, relative_error
from subquad.site_oracle import site_rungs
from subquad.verification import end_to_end_rungs, graph_output


def prompts(count: int) -> list[str]:
    """The first turns of evenly spaced rows of spec_bench_half.jsonl."""
    rows = [
        json.loads(row) for row in (Path(os.environ["SUBQUAD_DATA"]) / "spec_bench_half.jsonl").read_text().splitlines()
    ]
    step = len(rows) // count
    return [row["turns"][0] for row in rows[::step][:count]]


def main() -> None:
    """Print the contract's table and the count of prompts with identical tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    if "SUBQUAD_DATA" not in os.environ:
        raise SystemExit("bench_exact: set SUBQUAD_DATA to the directory that holds spec_bench_half.jsonl.")
    print(machine.line())
    directory = subquad.demo_weights()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = prompts(arguments.prompts)
    real = tokenizer(texts[:4], return_tensors="pt", padding=True, truncation=True, max_length=256, padding_side="left")
    inputs = {"input_ids": real["input_ids"], "attention_mask": real["attention_mask"]}
    print("| dtype | what | error (RMS) | allowed | holds |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        fast = subquad.rewrite(model, passes="fuse", verify=False)
        record = fast.__dict__["_subquad"]
        for rung in (site_rungs(record)[0], *end_to_end_rungs(fast, record, inputs)):
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {rung.rung}: {rung.detail} | {rung.error:.3g} | {rung.allowed:.3g} | {rung.passed} |")
        wide_window(directory, dtype, inputs)
        if dtype is torch.float32:
            tokens(fast, tokenizer, texts, arguments.tokens)


def wide_window(directory: Path, dtype: torch.dtype, inputs: dict[str, torch.Tensor]) -> None:
    """linearize:lolcats with a window as long as the text is softmax attention: its logits against the exact allowance."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    length = inputs["input_ids"].shape[1]
    fast = subquad.rewrite(model, passes=f"linearize:lolcats(window={length}, sinks=0)", verify=False)
    record = fast.__dict__["_subquad"]
    measured = end_to_end_rungs(fast, record, inputs)[0]
    with torch.no_grad(), original_forward(fast):
        before = fast(**inputs).logits
    keep = inputs["attention_mask"].bool()
    own = relative_error(before[keep], graph_output(record.original, inputs)[keep])
    allowed = allowed_error(own, dtype)
    name = str(dtype).removeprefix("torch.")
    what = f"lolcats, window {length} of {length} tokens, logits: {measured.detail}"
    print(f"| {name} | {what} | {measured.error:.3g} | {allowed:.3g} | {measured.error <= allowed} |")


def tokens(fast: torch.nn.Module, tokenizer: object, texts: list[str], count: int) -> None:
    """Greedy tokens with and without the rewrite, prompt by prompt, through the unchanged `generate`."""
    same = 0
    for text in texts:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        options = {"max_new_tokens": count, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            after = fast.generate(ids, **options)
            with original_forward(fast):
                before = fast.generate(ids, **options)
        same += int(torch.equal(before, after))
    print(f"\ngreedy, {count} new tokens, fp32: identical on {same} of {len(texts)} prompts\n")


if __name__ == "__main__":
    main()
