"""Gives frozen dataclasses a canonical JSON form, and checks their fields."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, fields
from typing import Any, Self


def choice(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is among `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}.{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def number(owner: str, name: str, value: object, positive: bool = False) -> None:
    """Raise ValueError unless `value` is a finite (and positive) number."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or (positive and value <= 0)
    ):
        raise ValueError(f"{owner}.{name} is {value!r}; it must be a finite{' positive' if positive else ''} number.")


def count(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{owner}.{name} is {value!r}; it must be an integer of at least 0.")


class Canonical:
    """Canonical JSON both ways for a frozen dataclass."""

    def json(self) -> str:
        """The spec as JSON with sorted keys and no spaces; equal specs give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))  # type: ignore[call-overload]

    @classmethod
    def read(cls, text: str) -> dict[str, Any]:
        """The fields in the text. Raises ValueError where it is no JSON object with names of fields."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The {cls.__name__} text {text!r} is not JSON: {error}.") from None
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(data, dict) or not set(data) <= names:
            raise ValueError(
                f"The {cls.__name__} text {text!r} must be a JSON object with keys among {', '.join(sorted(names))}."
            )
        return data

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def parse(cls, text: str) -> Self:
        """The spec written by `json`. Raises ValueError with the field at fault."""
        data = cls.read(text)
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
        except TypeError:
            raise ValueError(f"The {cls.__name__} text {text!r} lacks a required key.") from None
