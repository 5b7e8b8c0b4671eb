"""Token identity of speculation with Hugging Face's greedy generate in float32, differences judged in float64; resumable."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from speculate import GROUPS, Setup, prompts
from trained_drafters import stored, train
from transformers import AutoModelForCausalLM

import subquad
from subquad.ir.decoding import AcceptanceRule, Choice, Drafter, Drafting, ReadingDrafting, SelfDrafting, Verified
from subquad.ir.draft import DraftTree
from subquad.ir.trained import NOTHING, Trained
from subquad.passes.speculate.speculate import METHODS, TRAINED, Speculate
from subquad.runtime.chance import TorchChance
from subquad.runtime.pacing import FixedPacing
from subquad.runtime.processors import processors
from subquad.runtime.speculation import Ending

MARGIN = 1e-3
"""A differing token is a failure only where the float64 run's two best scores lie further apart than this."""


class Case(NamedTuple):
    """One way to generate; shape is "chain" or "tree", rows how many prompts are decoded together."""

    method: str
    shape: str
    rows: int
    penalty: float
    stop: bool

    def __str__(self) -> str:
        return (
            f"{self.method} {self.shape} batch {self.rows} penalty {self.penalty} {'stop' if self.stop else ''}".strip()
        )


@dataclass(frozen=True)
class Chains:
    """A drafter whose trees are cut to their first path."""

    whole: Drafter

    @property
    def acceptance(self) -> AcceptanceRule:
        return self.whole.acceptance

    def start(self, tokens: Sequence[int], choice: Choice) -> Drafting:
        return ChainDrafting(self.whole.start(tokens, choice))


@dataclass
class ChainDrafting:
    """One sequence of it."""

    whole: Any

    def attach(self, own: Any) -> None:
        if isinstance(self.whole, SelfDrafting):
            self.whole.attach(own)

    def read(self, hidden: torch.Tensor) -> None:
        if isinstance(self.whole, ReadingDrafting):
            self.whole.read(hidden)

    def propose(self, rows: int, depth: int) -> DraftTree:
        return self.whole.propose(rows, depth).first_path()

    def observe(self, result: Verified) -> None:
        self.whole.observe(result)


DEFAULT = Case("auto", "tree", 1, 1.0, False)


class Comparison:
    """Both sides, and a judge that is loaded when they differ."""

    def __init__(self, count: int, compiled: bool, trained: Trained) -> None:
        self.setup, self.count, self.compiled = Setup(torch.float32, compiled), count, compiled
        self.setup.decoder.trained = trained
        self.tokenizer = self.setup.tokenizer
        self.tokenizer.padding_side, self.tokenizer.pad_token = "left", self.tokenizer.eos_token
        self._drafters: dict[str, Any] = {}

    @cached_property
    def judge(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(subquad.demo_weights(), dtype=torch.float64).eval()

    def verdicts(self, texts: Sequence[str], case: Case) -> list[str]:
        """Per prompt "identical", "within the margin" or "wrong", with the place where it is not identical."""
        chats = [[{"role": "user", "content": text}] for text in texts]
        made = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        ids, mask = made["input_ids"], made["attention_mask"]
        ends = [*self.setup.ends, *(self.tokenizer(".\n", add_special_tokens=False)["input_ids"] if case.stop else [])]
        with torch.inference_mode():
            out = self.setup.peer.generate(ids, attention_mask=mask, max_new_tokens=self.count, do_sample=False,
                                           repetition_penalty=case.penalty, eos_token_id=ends,
                                           pad_token_id=self.setup.ends[0])  # fmt: skip
        got = []
        for first in range(0, len(texts), case.rows):
            rows = slice(first, first + case.rows)
            padding = int((mask[rows] == 0).all(0).sum())
            got += self._ours(ids[rows, padding:], mask[rows, padding:], case, ends)
        return [
            self._verdict(ids[n][mask[n] != 0], got[n], _until(out[n, ids.shape[1] :].tolist(), ends), case.penalty)
            for n in range(len(texts))
        ]

    def _ours(self, ids: torch.Tensor, mask: torch.Tensor, case: Case, ends: Sequence[int]) -> list[list[int]]:
        if case.method not in self._drafters:
            trained = self.setup.decoder.trained if case.method in TRAINED else NOTHING
            self._drafters[case.method] = Speculate(method=case.method).drafter(trained)
        drafter = self._drafters[case.method]
        drafter = Chains(drafter) if case.shape == "chain" else drafter
        choice = Choice(processors(repetition_penalty=case.penalty), True, TorchChance())
        rows: list[list[int]] = [[] for _ in range(len(ids))]
        decoding = self.setup.decoder.decode(
            ids, mask, choice=choice, ending=Ending(self.count, frozenset(ends)), drafter=drafter,
            pacing=None if self.compiled else FixedPacing(max(1, 16 // len(ids) - 1)),
        )  # fmt: skip
        for one in decoding:
            for row, emitted in zip(rows, one.emitted, strict=True):
                row += [emission.token for emission in emitted]
        return rows

    def _verdict(self, prompt: torch.Tensor, got: list[int], want: list[int], penalty: float) -> str:
        if got == want:
            return "identical"
        place = next((n for n, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        ids = torch.cat([prompt, torch.tensor(want[:place], dtype=prompt.dtype)])[None]
        with torch.inference_mode():
            scores = self.judge(ids).logits[:, -1]
        seen = scores.gather(1, ids)
        scores = scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
        best = scores[0].topk(2).values
        kind = "within the margin" if float(best[0] - best[1]) <= MARGIN else "wrong"
        return f"{kind}: token {place}, float64 margin {float(best[0] - best[1]):.1e}"


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first end, without what fills the row behind it."""
    place = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str], Case]]:
    """(name, texts, case) of everything that was asked for, in a fixed order."""
    cases: list[Case] = [DEFAULT]
    if arguments.matrix:
        methods = sorted({*METHODS, *(TRAINED if arguments.train_tokens else stored(arguments.trained).parameters)})
        cases = [Case(*c) for c in itertools.product(methods, ("chain", "tree"), (1, 4), (1.0, 1.2), (False, True))]
    chosen = prompts(arguments.prompts)
    for case in cases:
        for group in arguments.groups:
            texts = chosen[group]
            for first in range(0, len(texts), max(case.rows, arguments.together)):
                yield f"{case} | {group} {first}", texts[first : first + max(case.rows, arguments.together)], case


def main() -> None:
    """Compare what the file of results lacks, and print the table of all that it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=40, help="per group; 40 are all")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--matrix", action="store_true", help="every drafter × chain/tree × batch × penalty × stop")
    parser.add_argument("--train-tokens", type=int, default=0, help="every trained drafter joins, trained on so many")
    parser.add_argument("--trained", nargs="+", default=[], help="outputs of convert, whose drafters join the matrix")
    parser.add_argument("--together", type=int, default=1, help="prompts that Hugging Face's generate is given at once")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="compiled, and paced by measured costs as in use; else every draft is filled",
    )
    parser.add_argument("--stride", type=int, default=1, help="compare every so-manieth job only")
    parser.add_argument("--results", type=Path, help="a file of results: what is in it is not run again")
    arguments = parser.parse_args()
    known: dict[str, list[str]] = {}
    if arguments.results is not None and arguments.results.exists():
        known = dict(map(json.loads, arguments.results.read_text(encoding="utf-8").splitlines()))
    comparison: Comparison | None = None
    asked = list(jobs(arguments))[:: arguments.stride]
    for name, texts, case in asked:
        name = f"{name} | {arguments.tokens} tokens"
        if name in known:
            continue
        if comparison is None:
            trained = train(arguments.train_tokens) if arguments.train_tokens else stored(arguments.trained)
            comparison = Comparison(arguments.tokens, arguments.compiled, trained)
        known[name] = comparison.verdicts(texts, case)
        if arguments.results is not None:
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, known[name]]) + "\n")
        for verdict in known[name]:
            if verdict != "identical":
                print(f"{name}: {verdict}", flush=True)
    print(machine.line())
    print("| case | prompts | identical | within the margin | wrong |\n|---|---|---|---|---|")
    found: dict[str, Counter[str]] = {}
    for name, verdicts in known.items():
        found.setdefault(name.split(" | ")[0], Counter()).update(verdict.split(":")[0] for verdict in verdicts)
    for case_name, counts in found.items():
        cells = " | ".join(str(counts[kind]) for kind in ("identical", "within the margin", "wrong"))
        print(f"| {case_name} | {counts.total()} | {cells} |")


if __name__ == "__main__":
    main()
