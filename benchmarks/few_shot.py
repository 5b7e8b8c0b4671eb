"""Few-shot prompts from GSM8K: instructions, then one of several sets of solved problems, then a question of its own."""

from __future__ import annotations

import gzip
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch

FILE = "gsm8k_train.jsonl.gz"
INSTRUCTIONS = (
    "You solve word problems of arithmetic. Read the problem, write down every step with its numbers, one step a line, and "
    "put the answer alone on the last line after four number signs. Here are problems that were solved this way.\n\n"
)


def few_shot(tokenizer: Any, sets: int, shots: int, questions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [sets · questions, T], padded on the left: each row the instructions, `shots` solved problems, a question.

    Raises SystemExit without SUBQUAD_DATA.
    """
    if "SUBQUAD_DATA" not in os.environ:
        raise SystemExit(f"few_shot: set SUBQUAD_DATA to the directory that holds {FILE}.")
    with gzip.open(Path(os.environ["SUBQUAD_DATA"]) / FILE, "rt") as file:
        problems = [json.loads(line) for line in islice(file, sets * (shots + questions))]
    solved = iter(problems[: sets * shots])
    asked = iter(problems[sets * shots :])
    texts = []
    for _ in range(sets):
        shown = "".join(f"Problem: {p['question']}\n{p['answer']}\n\n" for p in islice(solved, shots))
        texts += [f"{INSTRUCTIONS}{shown}Problem: {p['question']}\n" for p in islice(asked, questions)]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    return made["input_ids"], made["attention_mask"]
