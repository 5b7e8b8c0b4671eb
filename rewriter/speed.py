"""Measure a rewritten model beside the original: alternating runs, medians of pairs, one ratio per figure."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from subquad.environment import describe
from subquad.ir.errors import SubquadError
from subquad.model_source import LoadedModel
from subquad.progress import progress
from subquad.text_generation import Generated, Sampling, compile_decoder, generate_text

PROMPT = "Explain in a few sentences how rainbows come about."


@dataclass(frozen=True)
class Figure:
    """One measured quantity: the original's and the rewritten model's median, and the median of the pairwise ratios.

    ratio above 1 means that the rewritten model is faster.
    """

    what: str
    unit: str
    original: float
    rewritten: float
    ratio: float


@dataclass
class Comparison:
    """All figures of one comparison with the machine they were taken on; text and tokens are the rewritten model's."""

    figures: list[Figure]
    machine: str
    pairs: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    tokens_per_second: float = float("nan")
    mean_accepted: float = 1.0
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """The public words of a comparison."""
        return {
            "figures": [figure.__dict__ for figure in self.figures],
            "machine": self.machine,
            "pairs": self.pairs,
            "text": self.text,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "mean_accepted": self.mean_accepted,
            "notes": self.notes,
        }


def machine() -> str:
    """The machine in one line: processor, cores, threads, torch."""
    facts = describe()
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, "
        f"{platform.system()}"
    )


def compare(
    original: LoadedModel,
    fast: LoadedModel,
    *,
    prompts: Sequence[str] = (PROMPT,),
    new_tokens: int = 64,
    pairs: int = 3,
) -> Comparison:
    """Run both models in turn, `pairs` times after a warm-up, on the same inputs.

    A model that generates is measured on time to first token and tokens per second: the original under its own `generate`,
    the rewritten one under the decoder that `subquad generate` uses.  Any other model is measured on one forward.
    """
    if pairs < 1:
        raise SubquadError(f"{pairs} pairs cannot be measured; give at least 1.")
    if fast.codec is not None and hasattr(fast.module, "generate") and fast.module.can_generate():
        return _generation(original, fast, prompts, new_tokens, pairs)
    return _forward(original, fast, pairs)


def _generation(
    original: LoadedModel, fast: LoadedModel, prompts: Sequence[str], new_tokens: int, pairs: int
) -> Comparison:
    sampling = Sampling(max_new_tokens=new_tokens)
    before: list[Generated] = []
    after: list[Generated] = []
    why = compile_decoder(fast.module)
    generate_text(original, prompts[0], sampling, engine="transformers")
    generate_text(fast, prompts[0], sampling)
    with progress("measuring", 2 * pairs * len(prompts)) as advance:
        for prompt in [*prompts] * pairs:
            before.append(generate_text(original, prompt, sampling, engine="transformers"))
            advance(1, "original measured")
            after.append(generate_text(fast, prompt, sampling))
            advance(1, "rewritten model measured")
    speeds = [(a.tokens_per_second, b.tokens_per_second) for a, b in zip(before, after, strict=True)]
    firsts = [(a.first_token_seconds, b.first_token_seconds) for a, b in zip(before, after, strict=True)]
    figures = [
        Figure("decode", "tokens/s", *_medians(speeds), statistics.median(b / a for a, b in speeds)),
        Figure("time to first token", "s", *_medians(firsts), statistics.median(a / b for a, b in firsts)),
    ]
    last = after[-1]
    agreement = all(a.tokens == b.tokens for a, b in zip(before, after, strict=True))
    accepted = statistics.mean(one.mean_accepted for one in after)
    notes = [*([] if why is None else [why]), *last.notes, f"original under {before[-1].engine}, rewritten under {last.engine}",
             f"greedy tokens {'identical' if agreement else 'differ'}"]  # fmt: skip
    return Comparison(figures, machine(), pairs, last.text, last.tokens, figures[0].rewritten, accepted, notes)


def _forward(original: LoadedModel, fast: LoadedModel, pairs: int) -> Comparison:
    from subquad.application import rewritten

    record = rewritten(fast.module)
    if record is None:
        raise SubquadError(f"{fast.origin} was not rewritten, so there is nothing to compare.")
    inputs = record.original.example
    runs = [_runner(loaded.module, inputs) for loaded in (original, fast)]
    times: list[tuple[float, float]] = []
    with progress("measuring", pairs + 1) as advance:
        for _ in range(pairs + 1):
            first, second = (_seconds(run) for run in runs)
            times.append((first, second))
            advance(1, None)
    times = times[1:]
    figure = Figure("forward", "s", *_medians(times), statistics.median(a / b for a, b in times))
    return Comparison([figure], machine(), pairs)


def _runner(module: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    callee = module.module() if isinstance(module, torch.export.ExportedProgram) else module
    tensors = list(inputs.values())

    def run() -> Any:
        try:
            return pytree.tree_leaves(callee(**inputs))
        except TypeError:
            return pytree.tree_leaves(callee(*tensors))

    return run


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        run()
    return time.perf_counter() - start


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
