"""The text that a drafter learns from, batch by batch, kept in the private cache: half of it read, half of it written."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from subquad.decoder import Decoder
from subquad.ir.errors import ConversionError
from subquad.private_cache import cache_root
from subquad.progress import progress
from subquad.tensor_writing import write_tensors
from subquad.training.foretold import Foretold, read, written
from subquad.training.prompts import MOST, plain, prompts

ROWS, LONGEST = 16, 128
"""Prompts that are answered together, the most rows for which a decoder is compiled, and tokens of an answer."""
CHUNK = 256
"""Tokens that are read at once."""
FOLDER = "foretold"
FORMAT = 2
"""Of the batches that are kept."""

Make = Callable[[], Foretold]


def foretold_text(decoder: Decoder, text: Path, codec: Any, eos: Sequence[int], tokens: int, model: str) -> Foretold:
    """At least `tokens` tokens: half read from a text, half answers to prompts made of its lines; the answers come last.

    codec: the model's tokenizer, or a function from text to ids.  eos: ids that end an answer.  model: hash of the weights,
    by which batches are kept, so that an interrupted run goes on.  Raises ConversionError when the text is too short.
    """
    data = hashlib.sha256(text.read_bytes() if text.is_file() else b"").hexdigest()
    key = hashlib.sha256(f"{FORMAT} {model} {data} {ROWS} {LONGEST} {CHUNK} {eos}".encode()).hexdigest()[:16]
    folder = cache_root() / FOLDER / key
    folder.mkdir(parents=True, exist_ok=True)
    limit = decoder.limit or CHUNK + MOST
    longest = min(LONGEST, limit // 2)
    short = (row for row in prompts(text, codec) if len(row) <= limit - longest)
    chunks = (partial(read, decoder, ids) for ids in _cut(plain(text, codec), min(CHUNK, limit)))
    batches = (partial(written, decoder, rows, eos, longest) for rows in _batches(short))
    found: list[Foretold] = []
    with progress("the model reads and writes", tokens) as advance:
        for kind, source, wanted in (("read", chunks, tokens // 2), ("written", batches, tokens - tokens // 2)):
            for part in _enough(source, wanted, folder, kind, text):
                found.append(part)
                advance(len(part), f"tokens that the model has {kind}")
    return Foretold.joined(found)


def _enough(source: Iterator[Make], tokens: int, folder: Path, kind: str, text: Path) -> Iterator[Foretold]:
    total = 0
    for number, make in enumerate(source):
        if total >= tokens:
            return
        part = _kept(folder / f"{kind}-{number}.safetensors", make)
        total += len(part)
        yield part
    if total < tokens:
        raise ConversionError(
            f"{text} gives {total} tokens to be {kind} by the model, which is less than the {tokens} that training asks for; "
            "give a longer text or ask for fewer tokens."
        )


def _cut(ids: Iterator[int], length: int) -> Iterator[list[int]]:
    while len(chunk := list(itertools.islice(ids, length))) == length:
        yield chunk


def _batches(rows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    while batch := list(itertools.islice(rows, ROWS)):
        yield batch


def _kept(path: Path, make: Make) -> Foretold:
    """A batch from the cache, or made now and put there; a full disk is no reason to stop."""
    from safetensors.torch import load_file

    try:
        return Foretold(**load_file(str(path)))
    except Exception:
        made = make()
    fresh = path.with_suffix(".new")
    try:
        write_tensors(vars(made), fresh)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
    return made
