"""Decoding at batch 1: our decoder beside Hugging Face generate and llama.cpp, tokens per second, first token, memory."""

from __future__ import annotations

import argparse
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import llama_peer
import machine
import torch

import subquad

PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."


def chat_ids(directory: Path) -> torch.Tensor:
    """The prompt through the model's chat template, as ids [1, T]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": PROMPT}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def ours(made: object, ids: torch.Tensor, count: int) -> float:
    """Tokens per second after the first."""
    times = [time.perf_counter() for _ in made.generate(ids, max_new_tokens=count)]
    return (len(times) - 1) / (times[-1] - times[0])


def theirs(model: torch.nn.Module, ids: torch.Tensor, count: int) -> float:
    """Tokens per second after the first of Hugging Face's generate with its cache."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    clock.times = []
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=clock, use_cache=True)
    return (len(clock.times) - 2) / (clock.times[-1] - clock.times[1])


def steady(arguments: argparse.Namespace) -> None:
    """Runs of each in turn, medians and their ratios, the physical limit of the same minutes beside them."""
    from transformers import AutoModelForCausalLM

    from subquad.incremental import decoder

    directory = subquad.demo_weights()
    ids = chat_ids(directory)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    peer = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    made = decoder(subquad.rewrite(model, passes="fuse", verify=False))
    start = time.perf_counter()
    made.compile()
    ready = time.perf_counter() - start
    count = arguments.tokens
    bytes_read = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = f"limit: {bytes_read / 1e6:.0f} MB of weights at the memory's rate"
    with llama_peer.llama_cpp(count, arguments.dtype, ends=False, python=arguments.llama_python) as llama:
        runs: dict[str, Callable[[], float]] = {
            "subquad": lambda: ours(made, ids, count),
            "Hugging Face generate, cache on": lambda: theirs(peer, ids, count),
            limit: lambda: machine.read_bandwidth(repeats=3) / bytes_read,
        }
        if llama is not None:
            runs["llama.cpp, the same tensors"] = lambda: operator.truediv(*llama(PROMPT))
        values: dict[str, list[float]] = {name: [] for name in runs}
        for n in range(arguments.pairs + 1):
            for name, run in runs.items():
                speed = run()
                if n:
                    values[name].append(speed)
    print(f"programs ready after {ready:.1f} s ({arguments.dtype}, {count} tokens, prompt of {ids.shape[1]})")
    print("| decoder | tokens/s (median) | best | subquad / it, median of the ratios |\n|---|---|---|---|")
    for name, found in values.items():
        ratio = statistics.median(a / b for a, b in zip(values["subquad"], found, strict=True))
        print(f"| {name} | {statistics.median(found):.1f} | {max(found):.1f} | {ratio:.2f} |")
    if llama is None:
        print("| llama.cpp | not installed here | | |")


FIRST = """
import sys, time
start = time.perf_counter()
from subquad.text_generation import Sampling, open_for_generation, compile_decoder, decoder_of
import torch
loaded = open_for_generation(sys.argv[1])
made = decoder_of(loaded.module)
ready = float("nan")
if sys.argv[2] == "compiled":
    made.compile(wait=False)
    while not (made.ready or made.failure):
        time.sleep(0.01)
    ready = time.perf_counter() - start
    while not (made.complete or made.failure):
        time.sleep(0.01)
ids = torch.tensor([[int(i) for i in sys.argv[3].split(",")]])
stream = made.generate(ids, max_new_tokens=16)
next(stream)
first = time.perf_counter() - start
list(stream)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss inherits the parent's
print(ready, first, int(peak.split()[1]) / 1024)
"""


def first_token(ids: torch.Tensor) -> None:
    """Seconds from process start to the first token, and peak memory: fallback, first run ever, later runs."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(subquad.demo_weights(), dtype=torch.bfloat16).eval()
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        subquad.save(subquad.rewrite(model, passes="fuse", verify=False), Path(folder) / "out")
        del model
        numbers = ",".join(map(str, ids[0].tolist()))
        print("| start | one-token programs in use (s) | first token (s) | peak memory (MB) | times the weights |")
        print("|---|---|---|---|---|")
        cache = os.environ | {"XDG_CACHE_HOME": folder}
        starts = {
            "fallback, nothing compiled": "plain",
            "first run ever, waiting for the compiler": "compiled",
            "later runs": "compiled",
        }
        for name, mode in starts.items():
            command = [sys.executable, "-P", "-c", FIRST, str(Path(folder) / "out"), mode, numbers]
            done = subprocess.run(command, env=cache, capture_output=True, text=True, check=True)
            ready, seconds, peak = map(float, done.stdout.split()[-3:])
            print(f"| {name} | {ready:.1f} | {seconds:.1f} | {peak:.0f} | {peak / weights:.2f} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--llama-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--skip-first-token", action="store_true")
    parser.add_argument("--only-first-token", action="store_true")
    arguments = parser.parse_args()
    print(machine.line())
    if not arguments.only_first_token:
        steady(arguments)
    if not arguments.skip_first_token:
        first_token(chat_ids(subquad.demo_weights()))


if __name__ == "__main__":
    main()
