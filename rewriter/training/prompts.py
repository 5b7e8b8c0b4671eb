"""Prompts out of a text: each of its longer lines, or of its JSON objects, asked of a model that chats, or left to go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from subquad.prompt_file import prompt_of
from subquad.training.text import encoder, lines

LEAST, MOST = 24, 1000
"""Characters of a line that makes a prompt, and characters of it that are used."""
OPENING = 32
"""Tokens of a line that a model without a chat template is given to go on from."""


def prompts(text: Path, codec: Any) -> Iterator[list[int]]:
    """Ids of one prompt after another.

    text: UTF-8, or .gz of it; one prompt a line, or a .jsonl file of strings or objects with one of prompt_file.FIELDS.
    codec: a TextCodec, whose chat template asks, or anything else that makes ids of text.
    Raises ConversionError for a text that cannot be read, GenerationError for a line that is no JSON with a prompt.
    """
    chats = getattr(codec, "chat_template", None) is not None
    encode = encoder(codec)
    for line in _lines(text):
        ids = codec.chat(line[:MOST]) if chats else encode(line[:MOST])[:OPENING]
        if ids:
            yield ids


def plain(text: Path, codec: Any) -> Iterator[int]:
    """The ids of the same lines, one after another."""
    encode = encoder(codec)
    for line in _lines(text):
        yield from encode(line + "\n")


def _lines(text: Path) -> Iterator[str]:
    structured = ".jsonl" in text.suffixes
    for number, written in enumerate(lines(text), 1):
        line = written.strip()
        line = prompt_of(line, number, text) if structured and line else line
        if len(line) >= LEAST:
            yield line
