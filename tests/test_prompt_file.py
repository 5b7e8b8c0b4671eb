"""Prompt files: text and JSON lines are read, anything else is one sentence."""

from pathlib import Path

import pytest

from subquad.ir.errors import GenerationError
from subquad.prompt_file import read_prompts


def test_prompts_are_read_from_text_and_json_lines(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo words\n")
    assert read_prompts(text) == ["one", "two words"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a"}\n{"turns": ["b", "c"]}\n"d"\n{"question": "e", "answer": "f"}\n')
    assert read_prompts(lines) == ["a", "b", "d", "e"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds no prompt"), ("{", "line 1 of .* is no JSON"), ('{"prompt": 3}', "line 1 of .* has no prompt"), ("[]", "has no prompt")],
)  # fmt: skip
def test_what_is_no_prompt_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(GenerationError, match=said):
        read_prompts(path)
    with pytest.raises(GenerationError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")
