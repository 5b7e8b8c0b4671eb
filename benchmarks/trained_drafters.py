"""Heads trained for the demo model beside untrained drafters: mean accepted tokens and speed (`speculate.py trained`)."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import subquad
from subquad.drafter_file import NAME, read_drafters
from subquad.ir.trained import Trained
from subquad.passes.speculate.speculate import TRAINED, Speculate, trained_drafter
from subquad.passes.speculate.suffix_automaton import SuffixMatch
from subquad.passes.speculate.token_recycling import TokenRecycling
from subquad.passes.speculate.union import Union
from subquad.private_cache import cache_root
from subquad.runtime.pacing import FixedPacing
from subquad.training import context_lessons, foretold_text, heads, prompt_tokens, sequences

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


def recipe(name: str, tokens: int, text: Path) -> str:
    """What a drafter's parameters follow from: hash of the code that trains it, of the text, the model and the budget."""
    found = hashlib.sha256(f"{name} {tokens}".encode() + text.read_bytes())
    for module in (
        sys.modules[TRAINED[name].__module__],
        heads,
        sequences,
        context_lessons,
        prompt_tokens,
        foretold_text,
    ):
        found.update(Path(str(module.__file__)).read_bytes())
    for file in sorted(Path(str(subquad.demo_weights())).glob("*.json")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def train(tokens: int, names: Sequence[str] = tuple(TRAINED)) -> Trained:
    """Drafters trained by `subquad.convert` on `tokens` tokens each, kept in the private cache; what is there is not trained
    again, and what was interrupted goes on.
    """
    from subquad.model_source import open_model

    folder = cache_root() / "benchmark-drafters"
    folder.mkdir(parents=True, exist_ok=True)
    text = training_prompts(folder / "prompts.jsonl")
    places = {name: folder / f"{name}-{recipe(name, tokens, text)}" for name in names}
    for name, place in places.items():
        if not (place / NAME).is_file():
            loaded = open_model("smollm2")
            fast = subquad.rewrite(loaded.module, passes=["fuse", f"speculate(method={name!r})"], verify=False)
            subquad.convert(fast, text=text, tokens=tokens, out=place, tokenizer=loaded.codec, overwrite=True)
        account: dict[str, Any] = json.loads((place / "conversion.json").read_text())["stages"][-1]
        print(f"{name}: {account['tokens']} tokens, {account['seconds']} s, guessed {account['guessed']}", flush=True)
    return stored([str(place) for place in places.values()])


def stored(folders: Sequence[str]) -> Trained:
    """What earlier conversions left in these directories."""
    found = [read_drafters(Path(folder)) for folder in folders]
    return Trained(
        {name: part for one in found for name, part in one.parameters.items()},
        {name: model for one in found for name, model in one.models.items()},
    )


class Kept:
    """Runs by what was run, in a file of JSON lines where one is given, so that an interrupted comparison goes on."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.runs = path, dict[str, list[float]]()
        if path is not None and path.exists():
            self.runs = dict(map(json.loads, path.read_text(encoding="utf-8").splitlines()))

    def of(self, key: Sequence[Any], run: Callable[[], Any]) -> list[float]:
        """(tokens after the first, passes, seconds, seconds of drafting) of a run, made now if it is not known."""
        name = json.dumps(key)
        if name not in self.runs:
            one = run()
            self.runs[name] = [len(one.tokens) - 1, one.passes, one.seconds, one.drafting]
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([name, self.runs[name]]) + "\n")
        return self.runs[name]


def compare(
    setup: Any, chosen: dict[str, list[str]], count: int, rows: Sequence[int], trained: Trained, results: Path | None,
    united: bool,
) -> None:  # fmt: skip
    """Every prompt plainly, by the untrained default, by each trained drafter alone and, with `united`, together with it, at
    fixed counts of rows.
    """
    setup.decoder.trained = trained
    trained, kept = setup.decoder.trained, Kept(results)
    makers = {"untrained": lambda: Speculate().drafter()}
    for name in trained.parameters:
        makers[name] = lambda name=name: trained_drafter(name, trained)
        if united:
            makers[f"untrained + {name}"] = lambda name=name: Union(
                (SuffixMatch(), TokenRecycling(), trained_drafter(name, trained))
            )
    digests = {word: trained.models.get(word.rpartition(" ")[2], "") for word in makers}
    sizes = {
        word: sum(t.sum().item() for t in trained.parameters.get(word.rpartition(" ")[2], {}).values())
        for word in makers
    }
    ways = {(word, width): make() for word, make in makers.items() for width in rows}
    found: dict[Any, list[list[list[float]]]] = defaultdict(list)
    for group, texts in chosen.items():
        runs = defaultdict(list)
        for number, text in enumerate(texts):
            ids, key = setup.ids(text), [group, number, len(texts), count, str(setup.peer.dtype)]
            runs["plain"].append(kept.of([*key, "plain"], lambda ids=ids: setup.ours(ids, count, None)))
            for way, drafter in ways.items():
                made = [*key, *way, digests[way[0]], round(sizes[way[0]], 3)]
                run = lambda ids=ids, d=drafter, w=way: setup.ours(ids, count, d, FixedPacing(w[1] - 1))  # noqa: E731
                runs[way].append(kept.of(made, run))
        for way, each in runs.items():
            found[way].append(each)
    print(
        f"| drafter | rows | {' | '.join(chosen)} | mean accepted | × plain | drafting |\n|{'---|' * (len(chosen) + 5)}"
    )
    for way in ways:
        accepted = [sum(r[0] for r in each) / max(1, sum(r[1] for r in each)) for each in found[way]]
        speeds = [
            statistics.median(
                (one[0] / one[2]) / (other[0] / other[2])
                for one, other in zip(each, plain, strict=True)
                if other[1] > 8
            )
            for each, plain in zip(found[way], found["plain"], strict=True)
        ]
        shares = [sum(r[3] for r in each) / sum(r[2] for r in each) for each in found[way]]
        cells = " | ".join(f"{value:.2f}" for value in accepted)
        means = f"{statistics.mean(accepted):.2f} | {statistics.mean(speeds):.2f} | {statistics.mean(shares):.1%}"
        print(f"| {way[0]} | {way[1]} | {cells} | {means} |", flush=True)
