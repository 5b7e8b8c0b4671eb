"""Read the prompts of a file: one a line, as text or as JSON objects."""

from __future__ import annotations

import json
from pathlib import Path

from subquad.ir.errors import GenerationError

FIELDS = ("prompt", "turns", "text", "question")
"""Where a JSON object may hold its prompt, in this order; the first of several turns is taken."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a `.jsonl` file (objects with one of FIELDS, or strings) or of a text file, one a line.

    Raises GenerationError for a file that cannot be read, holds no prompt, or has a line without one.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"the prompts in {path} cannot be read: {error}.") from error
    if not lines:
        raise GenerationError(f"{path} holds no prompt; write one a line.")
    return [prompt_of(line, number, path) for number, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines


def prompt_of(line: str, number: int, path: Path) -> str:
    """The prompt in one line of JSON; raises GenerationError when there is none."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise GenerationError(f"line {number} of {path} is no JSON: {error}.") from error
    if isinstance(item, str):
        return item
    for name in FIELDS if isinstance(item, dict) else ():
        value = item.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str):
            return value
    raise GenerationError(f"line {number} of {path} has no prompt; give one under {', '.join(FIELDS)}.")
