"""Draft-and-verify decoding on six groups of prompts: speed beside Hugging Face and llama.cpp, mean accepted tokens, costs."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_peer
import machine
import torch
import trained_drafters

import subquad
from subquad.ir.decoding import Choice, Drafter
from subquad.passes.speculate.speculate import METHODS, TRAINED, Speculate
from subquad.runtime.chance import TorchChance
from subquad.runtime.pacing import FixedPacing
from subquad.runtime.speculation import Ending

GROUPS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")


@dataclass
class Run:
    """One generation: its tokens, seconds after the first token, passes after the first, tokens fed, seconds of drafting."""

    tokens: list[int]
    seconds: float
    passes: int = 0
    fed: int = 0
    drafting: float = 0.0

    @property
    def speed(self) -> float:
        return (len(self.tokens) - 1) / self.seconds if self.seconds > 0 else float("nan")


def timed(tokens: int, seconds: float) -> Run:
    """A run of which only its number of tokens is known."""
    return Run([0] * (tokens + 1), seconds)


def prompts(count: int) -> dict[str, list[str]]:
    """The first turn of `count` questions of each group; MT-bench's eight categories are one group."""
    folder = os.environ.get("SUBQUAD_DATA")
    if folder is None:
        raise SystemExit("SUBQUAD_DATA is not set; it names the folder with spec_bench_half.jsonl.")
    found: dict[str, list[str]] = defaultdict(list)
    for line in (Path(folder) / "spec_bench_half.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        found[item["category"] if item["category"] in GROUPS else "mt_bench"].append(item["turns"][0])
    return {group: _spread(found[group], count) for group in GROUPS}


def _spread(texts: list[str], count: int) -> list[str]:
    """`count` texts evenly over the list, so that every category of a group is among them."""
    return [texts[n * len(texts) // count] for n in range(min(count, len(texts)))]


class Setup:
    """The demo model, its peer and its decoder."""

    def __init__(self, dtype: torch.dtype, compiled: bool) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from subquad.incremental import decoder

        directory = subquad.demo_weights()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.peer = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        self.decoder = decoder(subquad.rewrite(model, passes="fuse", verify=False))
        self.ends = (self.tokenizer.eos_token_id,)
        if compiled:
            self.decoder.compile()

    def ids(self, text: str) -> torch.Tensor:
        chat = [{"role": "user", "content": text}]
        made = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return made["input_ids"]

    def ours(self, ids: torch.Tensor, count: int, drafter: Drafter | None, pacing: Any = None) -> Run:
        choice = Choice((), True, TorchChance())
        run = Run([], 0.0)
        start = None
        for one in self.decoder.decode(
            ids, choice=choice, ending=Ending(count, self.ends), drafter=drafter, pacing=pacing
        ):
            run.tokens += [emission.token for emission in one.emitted[0]]
            if start is None:
                start = time.perf_counter()
                continue
            run.passes += 1
            run.fed += one.verified
            run.drafting += one.draft_seconds
        run.seconds = time.perf_counter() - start
        return run

    def theirs(self, ids: torch.Tensor, count: int, **options: Any) -> Run:
        from transformers.generation.streamers import BaseStreamer

        class Clock(BaseStreamer):
            def __init__(self) -> None:
                self.times: list[float] = []

            def put(self, value: torch.Tensor) -> None:
                self.times.append(time.perf_counter())

            def end(self) -> None:
                self.times.append(time.perf_counter())

        clock = Clock()
        with torch.inference_mode():
            out = self.peer.generate(ids, max_new_tokens=count, do_sample=False, streamer=clock, pad_token_id=self.ends[0],
                                     eos_token_id=self.ends[0], **options)  # fmt: skip
        return Run(out[0, ids.shape[1] :].tolist(), clock.times[-1] - clock.times[1])


def speed(
    setup: Setup,
    chosen: dict[str, list[str]],
    count: int,
    method: str,
    llama: Callable[[str], tuple[int, float]] | None,
) -> None:
    """Every prompt by every way in turn; tokens after the first over their time."""
    drafter = Speculate(method=method).drafter()
    ways: dict[str, Callable[[str], Run]] = {
        "HF generate": lambda text: setup.theirs(setup.ids(text), count),
        "HF prompt lookup": lambda text: setup.theirs(setup.ids(text), count, prompt_lookup_num_tokens=10),
        "plain": lambda text: setup.ours(setup.ids(text), count, None),
        "speculate": lambda text: setup.ours(setup.ids(text), count, drafter),
    }
    if llama is not None:
        ways = {"llama.cpp": lambda text: timed(*llama(text)), **ways}
    others = [way for way in ways if way != "speculate"]
    for way in ways.values():
        way("Name three rivers in Europe.")
    factors = " | ".join(f"speculating × {way}" for way in others)
    print(f"| group | tokens/s: {' | '.join(ways)} | {factors} | mean accepted | rows | drafting |")
    print("|---" * (4 + len(ways) + len(others)) + "|")
    totals: dict[str, list[float]] = defaultdict(list)
    for group, texts in chosen.items():
        runs: dict[str, list[Run]] = defaultdict(list)
        for text in texts:
            for name, way in ways.items():
                runs[name].append(way(text))
        found = runs["speculate"]
        kept = [n for n in range(len(found)) if min(len(runs[way][n].tokens) for way in ways) > 8]
        cells = [f"{statistics.median(runs[way][n].speed for n in kept):.1f}" for way in ways]
        for way in others:
            totals[way].append(statistics.median(found[n].speed / runs[way][n].speed for n in kept))
            cells.append(f"{totals[way][-1]:.2f}")
        passes, tokens = sum(r.passes for r in found), sum(len(r.tokens) - 1 for r in found)
        share = sum(r.drafting for r in found) / sum(r.seconds for r in found)
        cells += [f"{tokens / passes:.2f}", f"{sum(r.fed for r in found) / passes:.1f}", f"{share:.1%}"]
        print(f"| {group} ({len(kept)}) | " + " | ".join(cells) + " |", flush=True)
    means = " | ".join(f"{statistics.mean(values):.2f}" for values in totals.values())
    print(f"| mean of groups |{' |' * len(ways)} {means} | | | |")
    print(f"worst group against plain: {min(totals['plain']):.2f}")


def accepted(
    setup: Setup, chosen: dict[str, list[str]], count: int, methods: Sequence[str], rows: Sequence[int]
) -> None:
    """Mean accepted tokens of a pass, correction included, when all rows are filled."""
    print("| drafter | rows | " + " | ".join(chosen) + " | mean |\n|---|---|" + "---|" * (len(chosen) + 1))
    for method in methods:
        for width in rows:
            drafter = Speculate(method=method).drafter()
            found = []
            for texts in chosen.values():
                runs = [setup.ours(setup.ids(text), count, drafter, FixedPacing(width - 1)) for text in texts]
                found.append(sum(len(r.tokens) - 1 for r in runs) / max(1, sum(r.passes for r in runs)))
            cells = " | ".join(f"{value:.2f}" for value in found)
            print(f"| {method} | {width} | {cells} | {statistics.mean(found):.2f} |", flush=True)


def cost(setup: Setup, rows: Sequence[int], context: int = 256) -> None:
    """Milliseconds of a pass by the tokens fed, median of 15, beside one of a single token."""
    engine = setup.decoder.engine
    print("| rows | ms | / one row |\n|---|---|---|")
    one = None
    for width in rows:
        state = engine.start(1, context + 64)
        engine.run(state, torch.ones(1, context, dtype=torch.int64))
        times = []
        for _ in range(18):
            start = time.perf_counter()
            engine.run(state, torch.ones(1, width, dtype=torch.int64), None, False)
            times.append(time.perf_counter() - start)
            engine.rollback(state, width)
        middle = statistics.median(times[3:])
        one = one or middle
        print(f"| {width} | {middle * 1e3:.1f} | {middle / one:.2f} |", flush=True)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=10, help="per group")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--method", choices=sorted(METHODS), default="auto")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=("auto",))
    parser.add_argument("--rows", type=int, nargs="+", default=(4, 8, 16))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--not-compiled", action="store_true")
    parser.add_argument("--llama-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument(
        "--heads", nargs="+", default=(), metavar="OUT", help="what `subquad convert` wrote, for `trained`"
    )
    parser.add_argument("--train-tokens", type=int, default=30_000, help="to train on, where no --heads are given")
    parser.add_argument("--drafters", nargs="+", choices=sorted(TRAINED), default=tuple(TRAINED), help="for `trained`")
    parser.add_argument("--united", action="store_true", help="`trained` also unites each with the untrained default")
    parser.add_argument("--results", type=Path, help="a file of `trained`'s runs: what is in it is not run again")
    parser.add_argument("what", nargs="+", choices=("speed", "accepted", "cost", "trained"))
    arguments = parser.parse_args()
    print(machine.line())
    setup = Setup(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32, not arguments.not_compiled)
    chosen = {group: texts for group, texts in prompts(arguments.prompts).items() if group in arguments.groups}
    if "cost" in arguments.what:
        cost(setup, (1, 2, 4, 8, 16))
    if "speed" in arguments.what:
        with llama_peer.llama_cpp(arguments.tokens, arguments.dtype, True, arguments.llama_python) as llama:
            speed(setup, chosen, arguments.tokens, arguments.method, llama)
    if "accepted" in arguments.what:
        accepted(setup, chosen, arguments.tokens, arguments.methods, arguments.rows)
    if "trained" in arguments.what:
        rows = [width for width in arguments.rows if width > 1]
        if arguments.heads:
            trained = trained_drafters.stored(arguments.heads)
        else:
            trained = trained_drafters.train(arguments.train_tokens, arguments.drafters)
        trained_drafters.compare(setup, chosen, arguments.tokens, rows, trained, arguments.results, arguments.united)


if __name__ == "__main__":
    main()
