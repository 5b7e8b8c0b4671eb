"""Quality of SmolLM2 with all layers linearized and converted, beside the original and a window-only model trained alike."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

import subquad
from subquad.model_source import open_model
from subquad.training.adapters import linear_layers
from subquad.training.checkpoint import Checkpoint, Progress
from subquad.training.measure import measure
from subquad.training.registry_model import RegistryModel
from subquad.training.session import Session
from subquad.training.settings import Settings
from subquad.training.sites import TrainingSite, training_model
from subquad.training.stages import AdapterTraining
from subquad.training.text import read_corpus

TRAIN, VALID, OTHER = "wikitext2_train_articles_shuffled.txt.gz", "wikitext2_valid.txt.gz", "war_and_peace.txt.gz"
WINDOW, SINKS = 64, 4
KINDS = ("lolcats", "window", "original")


class Control(RegistryModel):
    """The same network trained alike with an attention that has no parameters: full softmax, or window and sinks alone."""

    def __init__(self, model: torch.nn.Module, sites: list[TrainingSite], kind: str) -> None:
        self.kind = kind
        super().__init__(model, sites)
        self.sites = []

    def rewritten(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        mask = None
        if self.kind == "window":
            i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])[None]
            mask = (j <= i) & ((i - j < WINDOW) | (j < SINKS))
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out.transpose(1, 2)


def linearized() -> tuple[torch.nn.Module, Any]:
    """SmolLM2 with every layer linearized, and its tokenizer."""
    opened = open_model("smollm2", dtype="bf16")
    fast = subquad.rewrite(opened.module, passes=f"linearize:lolcats(window={WINDOW}, sinks={SINKS})", verify=False)
    return fast, opened.codec


def converted(settings: Settings, data: Path, work: Path) -> list[dict[str, Any]]:
    """Run `subquad.convert` as a user would; returns its measurements."""
    fast, _ = linearized()
    subquad.convert(
        fast, text=data / TRAIN, tokens=settings.tokens, out=work / "lolcats", overwrite=True,
        measure_on=(data / VALID, data / OTHER), settings=settings,
    )  # fmt: skip
    return list(fast.report.conversion)


def control(kind: str, settings: Settings, data: Path, work: Path) -> list[dict[str, Any]]:
    """Train the same adapters on all the tokens, with the same loss and schedule; returns measurements."""
    settings = replace(settings, transfer_share=0.0, compile=False)
    fast, codec = linearized()
    fast.requires_grad_(False)
    view = training_model(fast, compile_it=False)
    view = Control(fast, view.sites, kind)
    text = read_corpus(data / TRAIN, codec, settings.used_tokens, 0)
    texts = {name: read_corpus(data / name, codec, settings.length, settings.held_out).all for name in (VALID, OTHER)}
    checkpoint = Checkpoint(work / f"{kind}.unfinished", settings.digest(text.digest, kind))
    stored = checkpoint.load()
    state, tensors = stored if stored is not None else (Progress(), {})

    def note(stage: str, tokens: int) -> None:
        if all(entry["stage"] != stage for entry in state.records):
            measured = {name: measure(view, ids, settings.length, settings.rows) for name, ids in texts.items()}
            state.records.append(
                {"stage": stage, "tokens": tokens, "seconds": round(state.seconds, 1), "texts": measured}
            )

    note("before", 0)
    paths = [name for name, module in fast.named_modules() if name.endswith("self_attn")]
    view.adapt(linear_layers(fast, paths), settings.rank, settings.alpha, settings.seed)
    training = AdapterTraining(view, settings, text.training)
    if state.stage == "adapters":
        training.load(tensors)
    size = settings.rows * settings.length
    Session(checkpoint, state).run(
        "adapters", f"{kind}: adapters", settings.adapter_batches, size, training.work, training.tensors
    )
    note("adapters", settings.used_tokens)
    checkpoint.remove()
    return state.records


def table(results: dict[str, list[dict[str, Any]]]) -> None:
    """All stages of all models, then the three ratios."""
    print("| model | stage | tokens | seconds | WikiText-2 perplexity | KL | war_and_peace perplexity | KL |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, records in results.items():
        for entry in records:
            valid, other = entry["texts"][VALID], entry["texts"][OTHER]
            print(
                f"| {kind} | {entry['stage']} | {entry['tokens']} | {entry['seconds']:.0f} | {valid['perplexity']:.2f} | "
                f"{valid['kl']:.4f} | {other['perplexity']:.2f} | {other['kl']:.4f} |"
            )
    last = {kind: records[-1]["texts"] for kind, records in results.items()}
    if set(last) == set(KINDS):
        ours, theirs = last["lolcats"][VALID]["perplexity"], last["original"][VALID]["perplexity"]
        print(f"lolcats / original trained alike, WikiText-2: {ours / theirs:.3f} (target at most 1.20)")
        print(
            f"lolcats / window-only trained alike, WikiText-2: {ours / last['window'][VALID]['perplexity']:.3f} (below 1)"
        )
    if "lolcats" in last:
        other = last["lolcats"][OTHER]
        print(
            f"lolcats / untouched original, war_and_peace: {other['perplexity'] / other['original_perplexity']:.3f} "
            "(target at most 1.15)"
        )


def main() -> None:
    """Train what has no result in the work directory yet, then print the table of all results there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_960, help="budget of every model, over all stages")
    parser.add_argument("--measure", type=int, default=12_288, help="tokens of each text to measure on")
    parser.add_argument("--only", choices=KINDS, help="train this model alone")
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench_lolcats"), help="where results and states are kept"
    )
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another value of a conversion setting"
    )
    arguments = parser.parse_args()
    if "SUBQUAD_DATA" not in os.environ:
        raise SystemExit(f"bench_lolcats: set SUBQUAD_DATA to the directory that holds {TRAIN}, {VALID} and {OTHER}.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    data = Path(os.environ["SUBQUAD_DATA"])
    arguments.work.mkdir(parents=True, exist_ok=True)
    changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in arguments.set)}
    settings = Settings(tokens=arguments.tokens, held_out=arguments.measure, **changes)
    print(machine.line())
    print(f"budget {settings.used_tokens} tokens; length {settings.length}; {json.dumps(settings.json())}")
    results = {}
    for kind in KINDS:
        stored = arguments.work / f"{kind}-{settings.digest()}.json"
        if not stored.exists() and arguments.only in (None, kind):
            where = (settings, data, arguments.work)
            run = converted(*where) if kind == "lolcats" else control(kind, *where)
            stored.write_text(json.dumps(run, indent=1))
        if stored.exists():
            results[kind] = json.loads(stored.read_text())
    table(results)


if __name__ == "__main__":
    main()
