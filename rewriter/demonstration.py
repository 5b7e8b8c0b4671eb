"""The whole path on the demo model: inspect, rewrite exactly, verify, generate, linearize, save, load."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from subquad.application import restore
from subquad.artifact import load, save
from subquad.ir.report import Report
from subquad.model_source import LoadedModel, open_model, source_note
from subquad.pipeline import inspect, rewrite
from subquad.speed import PROMPT, Figure
from subquad.text_generation import Sampling, compile_decoder, generate_text
from subquad.verification import verify

WINDOW = 64


@dataclass
class Stage:
    """One stage of the demonstration: what it shows, and whichever of report, figures, texts and facts it has."""

    name: str
    title: str
    seconds: float
    report: Report | None = None
    figures: list[Figure] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The stage as plain data."""
        return {
            "name": self.name,
            "title": self.title,
            "seconds": self.seconds,
            "report": None if self.report is None else self.report.json(),
            "figures": [figure.__dict__ for figure in self.figures],
            "texts": self.texts,
            "facts": self.facts,
        }


def demonstrate(spec: str = "smollm2", new_tokens: int = 32, prompt: str = PROMPT) -> Iterator[Stage]:
    """Yield the stages one by one, as they finish, each with its figures.

    spec: any Hugging Face causal language model that open_model takes.  Nothing is left behind: the artifacts go to a
    temporary directory.
    """
    clock = _Clock()
    loaded = open_model(spec)
    yield clock.stage("open", f"{loaded.origin} opened", facts=_facts(loaded))
    report = inspect(loaded.module)
    yield clock.stage("inspect", f"{len(report.sites)} attention sites found", report)

    original = generate_text(loaded, prompt, Sampling(new_tokens), engine="transformers")
    yield clock.stage("original", "the model's own generate, for comparison", texts={original.engine: original.text})
    fast = rewrite(loaded.module, passes="fuse", verify=False)
    yield clock.stage("rewrite", "every site replaced by one exact operator", fast.report)
    yield clock.stage("verify", "measured against a float64 run of the original", verify(fast))
    ours = generate_text(loaded, prompt, Sampling(new_tokens))
    compiled = compile_decoder(fast)
    again = generate_text(loaded, prompt, Sampling(new_tokens))
    ratio = again.tokens_per_second / original.tokens_per_second
    figures = [Figure("decode", "tokens/s", original.tokens_per_second, again.tokens_per_second, ratio)]
    texts = {f"original ({original.engine})": original.text, f"rewritten ({ours.engine})": ours.text}
    identical = original.tokens == ours.tokens
    facts = {"identical tokens": identical, "note": compiled or "; ".join(ours.notes)}
    dtype = next(loaded.module.parameters()).dtype
    if not identical and dtype in (torch.bfloat16, torch.float16):
        facts["why"] = f"in {dtype} nearly equal logits may round either way; verify, above, measured the logits"
    yield clock.stage("generate", "the same prompt beside the original", figures=figures, texts=texts, facts=facts)

    with tempfile.TemporaryDirectory(prefix="subquad-demo-") as scratch:
        out = save(fast, Path(scratch) / "exact")
        back = load(out)
        reopened = source_note(back)
        text = ""
        if reopened is not None:
            compile_decoder(back)
            text = generate_text(reopened, prompt, Sampling(new_tokens)).text
        same = text == again.text
        size = sum(p.stat().st_size for p in out.iterdir())
        facts = {
            "plan": fast.report.plan_hash,
            "MiB on disk": round(size / 2**20, 1),
            "same answer after loading": same,
        }
        yield clock.stage("artifact", "saved and loaded again", facts=facts)

    restore(fast)
    reference = _logits(loaded, prompt)
    linear = rewrite(loaded.module, passes=f"linearize:lolcats(window={WINDOW})", verify=False)
    drift = _drift(reference, _logits(loaded, prompt))
    yield clock.stage(
        "linearize",
        f"a linearized copy (window {WINDOW}), not yet trained: another function, its drift measured",
        linear.report,
        facts={**drift, "train it": "subquad convert OUT --text FILE --tokens N -o OUT2"},
    )


class _Clock:
    """Gives each stage the seconds since the last one."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def stage(self, name: str, title: str, report: Report | None = None, **rest: Any) -> Stage:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return Stage(name, title, round(seconds, 2), report, **rest)


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    parameters = sum(p.numel() for p in loaded.module.parameters())
    dtype = next(loaded.module.parameters()).dtype
    return {"parameters": parameters, "dtype": str(dtype).removeprefix("torch."), "notes": list(loaded.notes)}


TEXT = (
    "The harbour had been quiet since the ferries stopped. Gulls walked along the wall as though they had bought it, and the "
    "old crane turned a little in the wind with a noise like someone clearing his throat. On the far side a light went on in "
    "the customs house, then another, and a man came out with a bucket and began to wash the steps. Nobody had asked him to. "
    "He had washed them every morning for thirty years, and he saw no reason why the end of the world should find them dirty. "
    "When the first boat came round the point he straightened his back, put the bucket down, and counted the people on deck."
)


def _logits(loaded: LoadedModel, prompt: str) -> torch.Tensor:
    assert loaded.codec is not None
    ids = torch.tensor([loaded.codec.encode(f"{prompt}\n\n{TEXT}")])
    with torch.no_grad():
        return torch.log_softmax(loaded.module(input_ids=ids, use_cache=False).logits[0].double(), -1)


def _drift(before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    """How far two distributions over the next token are apart, averaged over positions."""
    divergence = (before.exp() * (before - after)).sum(-1)
    beyond = divergence[WINDOW:]
    return {
        "mean KL inside the window (nats)": round(float(divergence[:WINDOW].mean()), 6),
        "mean KL beyond it (nats)": round(float(beyond.mean()), 4) if len(beyond) else None,
        "same most likely token": f"{float((before.argmax(-1) == after.argmax(-1)).double().mean()):.1%}",
    }
