"""A hand-written loop that passes `past_key_values` along, as it stands and under @subquad.rewrite: tokens, seconds, ratio."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import machine
import torch
from transformers import AutoModelForCausalLM

import subquad
from subquad.step_model import held


def generate(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy: the last token and the cache go in, the next token and the cache come out."""
    past, feed = None, ids
    for _ in range(count):
        out = model(input_ids=feed, past_key_values=past, use_cache=True)
        past, feed = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, feed], dim=1)
    return ids


def main() -> None:
    """Alternate the original, ours and ours with drafts; check tokens; print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.dtype == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(subquad.demo_weights(), dtype=dtype).eval()
    loops = {
        "original": generate,
        "subquad": subquad.rewrite(generate),
        "subquad, drafts": subquad.rewrite(passes="speculate")(generate),
    }
    print(machine.line(), flush=True)
    with torch.no_grad():
        prompts = [torch.randint(model.config.vocab_size, (1, arguments.prompt)) for _ in range(arguments.pairs)]
        start = time.perf_counter()
        loops["subquad"](model, prompts[0], 8)
        if not held(model).steps:
            raise SystemExit(f"the loop was not rewritten: {loops['subquad'].report.refusals}")
        held(model).steps[0].decoder.compile()
        ready = time.perf_counter() - start
        print(f"first run and programs: {ready:.0f} s", flush=True)
        loops["subquad, drafts"](model, prompts[0], 16)
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        equal = 0
        for ids in prompts:
            made = []
            for name, run in loops.items():
                start = time.perf_counter()
                made.append(run(model, ids, arguments.tokens))
                seconds[name].append(time.perf_counter() - start)
            equal += int(all(torch.equal(one, made[0]) for one in made))
    print(f"SmolLM2-135M-Instruct, {arguments.dtype}, {arguments.prompt} random + {arguments.tokens} greedy tokens")
    print("| loop | seconds (median) | tokens/s | ratio |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["original"], found, strict=True))
        print(
            f"| {name} | {statistics.median(found):.2f} | {arguments.tokens / statistics.median(found):.1f} | {ratio:.2f}x |"
        )
    print(f"identical tokens in {equal} of {arguments.pairs} runs")
    print("; ".join([*loops["subquad"].report.notes, *map(str, loops["subquad"].report.refusals)]))


if __name__ == "__main__":
    main()
