"""Answer many prompts together: batches through the decoder, which computes once what the prompts have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from subquad.ir.decoding import Choice
from subquad.ir.errors import GenerationError
from subquad.model_source import LoadedModel
from subquad.runtime.chance import seeded
from subquad.runtime.pacing import MOST
from subquad.runtime.processors import processors
from subquad.runtime.sharing_plan import SharingPlan
from subquad.runtime.speculation import Ending
from subquad.speculation_words import spoken
from subquad.text_generation import Sampling, decoder_of

BATCH = 64
"""Prompts that run together when nobody says how many."""


@dataclass
class Answers:
    """Answers to prompts, in their order, and the speed of all together.

    texts, tokens: the new tokens of each prompt, decoded (without the end token) and as ids.  prompt_tokens: of each prompt.
    first_token_seconds: of all batches, until each had its first tokens.  tokens_per_second: tokens after the first of each
    row over their time, all rows together; NaN without any.  sharing: what the prompts of each batch had in common.
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    first_token_seconds: float = 0.0
    tokens_per_second: float = float("nan")
    sharing: list[SharingPlan] = field(default_factory=list)
    interrupted: bool = False

    def json(self) -> dict[str, Any]:
        """The public words of a generation for several prompts."""
        answers = zip(self.texts, self.tokens, self.prompt_tokens, strict=True)
        return {
            "answers": [{"text": text, "tokens": new, "prompt_tokens": before} for text, new, before in answers],
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
            "sharing": [plan.json() for plan in self.sharing],
            "interrupted": self.interrupted,
        }


def generate_answers(
    loaded: LoadedModel, prompts: Sequence[str], sampling: Sampling, *, raw: bool = False, batch: int = BATCH,
    share: bool = True, on_rows: Callable[[int], None] = lambda rows: None,
) -> Answers:  # fmt: skip
    """Answer every prompt; see text_generation.generate_text.

    batch: prompts that run together.  share: compute and store once what they have in common.  on_rows: called with the
    number of rows that have ended.  Ctrl-C keeps what was decoded.  Raises GenerationError when the model has no tokenizer
    or a prompt is empty, NotIncremental when it cannot be decoded step by step.
    """
    if loaded.codec is None:
        raise GenerationError(f"{loaded.origin} has no tokenizer, so it cannot answer prompts.")
    codec = loaded.codec
    rows = [codec.encode(prompt) if raw else codec.chat(prompt) for prompt in prompts]
    for number, row in enumerate(rows, 1):
        if not row:
            raise GenerationError(f"prompt {number} is empty; give it some text.")
    found = Answers(prompt_tokens=[len(row) for row in rows])
    spent = _Clock()
    try:
        for start in range(0, len(rows), batch):
            _run(loaded, rows[start : start + batch], sampling, share, found, spent, on_rows)
    except KeyboardInterrupt:
        found.interrupted = True
    found.tokens += [[] for _ in rows[len(found.tokens) :]]
    found.texts = [codec.decode([token for token in new if token not in codec.eos]) for new in found.tokens]
    found.first_token_seconds = spent.first
    found.tokens_per_second = spent.later / spent.rest if spent.rest else float("nan")
    return found


@dataclass
class _Clock:
    """Seconds until first tokens and after them, and tokens after the first."""

    first: float = 0.0
    rest: float = 0.0
    later: int = 0


def _run(
    loaded: LoadedModel, rows: list[list[int]], sampling: Sampling, share: bool, found: Answers, spent: _Clock,
    on_rows: Callable[[int], None],
) -> None:  # fmt: skip
    decoder, codec = decoder_of(loaded.module), loaded.codec
    assert codec is not None
    width = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    wanted = spoken(dict(sampling.speculation), decoder.speculation)
    passes = decoder.decode(
        ids.to(decoder.engine.device),
        None if bool(mask.all()) else mask.to(decoder.engine.device),
        choice=Choice(
            processors(sampling.temperature, sampling.top_k, sampling.top_p),
            sampling.temperature == 0,
            seeded(sampling.seed, decoder.engine.device),
        ),
        ending=Ending(sampling.max_new_tokens, frozenset(codec.eos)),
        drafter=None if wanted is None else decoder.drafter(wanted),
        most=MOST if wanted is None else 1 + wanted.num_speculative_tokens,
        share=share,
        on_sharing=found.sharing.append,
    )
    new: list[list[int]] = [[] for _ in rows]
    found.tokens += new
    start = time.perf_counter()
    for n, one in enumerate(passes):
        now = time.perf_counter()
        for row, emissions in zip(new, one.emitted, strict=True):
            row += [emission.token for emission in emissions]
        if n:
            spent.rest += now - start
            spent.later += sum(map(len, one.emitted))
        else:
            spent.first += now - start
        start = now
        on_rows(len(found.tokens) - len(rows) + sum(one.ended))
