"""Text to token ids and back without transformers: tokenizer.json, and the chat template in a sandbox."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from subquad.ir.errors import GenerationError, ModelSourceError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "added_tokens.json",
)


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer with its chat template and the ids that end a text.

    tokenizer: a tokenizers.Tokenizer.  chat_template: Jinja source, or None for a model that does not chat.
    eos: ids at which generation stops.  special: names such as bos_token that templates read.
    """

    tokenizer: Any
    chat_template: str | None = None
    eos: tuple[int, ...] = ()
    special: dict[str, str] = field(default_factory=dict)

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself unless told not to."""
        return list(self.tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def chat(self, messages: list[dict[str, str]] | str) -> list[int]:
        """Token ids of a conversation that asks for the assistant's answer; a plain string is one user message.

        Without a chat template the text is encoded as it stands.  Raises GenerationError when the template refuses.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if self.chat_template is None:
            return self.encode("\n".join(turn["content"] for turn in turns))
        return self.encode(render_chat(self.chat_template, turns, self.special), special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def render_chat(template: str, messages: list[dict[str, str]], special: dict[str, str]) -> str:
    """A conversation written out by a model's Jinja template, in a sandbox that can neither call nor change Python objects."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except jinja2.TemplateError as error:
        raise GenerationError(f"the model's chat template cannot write out this conversation: {error}.") from error


def read_codec(directory: Path) -> TextCodec | None:
    """The tokenizer of a directory in Hugging Face format, or None when it holds no tokenizer.json.

    Raises ModelSourceError when a file there is torn.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelSourceError(
            f"{path} is not a tokenizer file ({str(error).splitlines()[0]}); fetch it again."
        ) from error
    settings = read_json(directory / "tokenizer_config.json")
    separate = directory / "chat_template.jinja"
    template = separate.read_text(encoding="utf-8") if separate.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    special = {key: _content(value) for key, value in settings.items() if key.endswith("_token") and value is not None}
    ids = read_json(directory / "generation_config.json").get("eos_token_id")
    if ids is None:
        ids = read_json(directory / "config.json").get("eos_token_id")
    if ids is None and "eos_token" in special:
        ids = tokenizer.token_to_id(special["eos_token"])
    eos = tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)
    return TextCodec(tokenizer, template, eos, special)


def _content(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when the file is absent; raises ModelSourceError when it is not JSON."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelSourceError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(data, dict):
        raise ModelSourceError(f"{path} holds a {type(data).__name__} where an object is expected; fetch it again.")
    return data
