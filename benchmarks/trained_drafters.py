"""Heads trained for the demo model beside untrained drafters: mean accepted tokens and speed (`speculate.py trained`)."""

from __future__ import annotations

import gzip
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import subquad
from subquad.drafter_file import read_drafters
from subquad.ir.trained import Trained
from subquad.passes.speculate.speculate import TRAINED, Speculate, trained_drafter
from subquad.passes.speculate.suffix_automaton import SuffixMatch
from subquad.passes.speculate.token_recycling import TokenRecycling
from subquad.passes.speculate.union import Union
from subquad.runtime.pacing import FixedPacing

ASKED = (
    "{}", "Summarize: {}", "What are the main points of this text?\n{}", "Explain this to a child: {}",
    "Write a blog post about the following. {}", "Rewrite this text in your own words: {}", "Who or what is this about?\n{}",
)  # fmt: skip
"""What is asked about paragraphs of Wikipedia; every fourth prompt is a question of GSM8K's training part instead."""


def training_prompts(path: Path) -> Path:
    """A prompt a line; none of them is in Spec-Bench."""
    folder = Path(os.environ["SUBQUAD_DATA"])
    with gzip.open(folder / "wikitext2_train_articles_shuffled.txt.gz", "rt", encoding="utf-8") as file:
        paragraphs = [line.strip() for line in file if 250 < len(line) < 900 and not line.startswith(" =")]
    with gzip.open(folder / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    made = [ASKED[n % len(ASKED)].format(text) for n, text in enumerate(paragraphs)]
    for n, question in enumerate(questions[: len(made) // 3]):
        made.insert(4 * n, question)
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in made), encoding="utf-8")
    return path


def train(tokens: int, out: Path) -> Trained:
    """Heads of every kind, each trained by `subquad.convert` on `tokens` tokens and saved in a directory below `out`."""
    from subquad.model_source import open_model

    parameters, models = {}, {}
    text = training_prompts(out / "prompts.jsonl")
    for name in TRAINED:
        loaded = open_model("smollm2")
        fast = subquad.rewrite(loaded.module, passes=["fuse", f"speculate(method={name!r})"], verify=False)
        start = time.perf_counter()
        subquad.convert(fast, text=text, tokens=tokens, out=out / name, tokenizer=loaded.codec, overwrite=True)
        account: dict[str, Any] = fast.report.conversion[-1]  # type: ignore[union-attr, index, assignment]
        print(f"{name}: {account['tokens']} tokens, {time.perf_counter() - start:.0f} s, guessed {account['guessed']}")
        found = read_drafters(out / name)
        parameters[name], models[name] = found.parameters[name], found.models[name]
    return Trained(parameters, models)


def stored(folders: Sequence[str]) -> Trained:
    """What earlier conversions left in these directories."""
    found = [read_drafters(Path(folder)) for folder in folders]
    return Trained(
        {name: part for one in found for name, part in one.parameters.items()},
        {name: model for one in found for name, model in one.models.items()},
    )


def compare(
    setup: Any, chosen: dict[str, list[str]], count: int, rows: Sequence[int], tokens: int, folders: Sequence[str]
) -> None:
    """Every prompt plainly, by the untrained default, by trained heads alone and united with it, at fixed counts of rows."""
    if folders:
        setup.decoder.trained = stored(folders)
    else:
        kept = Path(tempfile.mkdtemp(prefix="subquad-heads-"))
        setup.decoder.trained = train(tokens, kept)
        print(f"the heads are in {kept}")
    trained = setup.decoder.trained
    makers = {"untrained": lambda: Speculate().drafter()}
    for name in trained.parameters:
        makers[name] = lambda name=name: trained_drafter(name, trained)
        makers[f"untrained + {name}"] = lambda name=name: Union(
            (SuffixMatch(), TokenRecycling(), trained_drafter(name, trained))
        )
    ways = {(word, width): make() for word, make in makers.items() for width in rows}
    accepted: dict[Any, dict[str, float]] = defaultdict(dict)
    speeds: dict[Any, list[float]] = defaultdict(list)
    shares: dict[Any, list[float]] = defaultdict(list)
    for group, texts in chosen.items():
        runs = defaultdict(list)
        for text in texts:
            ids = setup.ids(text)
            runs["plain"].append(setup.ours(ids, count, None))
            for way, drafter in ways.items():
                runs[way].append(setup.ours(ids, count, drafter, FixedPacing(way[1] - 1)))
        for way in ways:
            accepted[way][group] = sum(len(r.tokens) - 1 for r in runs[way]) / max(1, sum(r.passes for r in runs[way]))
            pairs = zip(runs[way], runs["plain"], strict=True)
            speeds[way].append(statistics.median(one.speed / other.speed for one, other in pairs if other.passes > 8))
            shares[way].append(sum(r.drafting for r in runs[way]) / sum(r.seconds for r in runs[way]))
    print(
        f"| drafter | rows | {' | '.join(chosen)} | mean accepted | × plain | drafting |\n|{'---|' * (len(chosen) + 5)}"
    )
    for way in ways:
        cells = " | ".join(f"{value:.2f}" for value in accepted[way].values())
        means = f"{statistics.mean(accepted[way].values()):.2f} | {statistics.mean(speeds[way]):.2f}"
        print(f"| {way[0]} | {way[1]} | {cells} | {means} | {statistics.mean(shares[way]):.1%} |", flush=True)
