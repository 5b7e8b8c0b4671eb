"""One loop of the tests: the function, the model it calls, what it is called with, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Case:
    """function: called as function(model, ids, **arguments).  model: makes the model.  batch: rows of the prompts.

    refused: None when the loop must be rewritten, else (slot, words of the reason, text of the line it names).
    partly: words of the note that says why some calls ran the model itself, "" where none may.
    reads: slots by name and the kinds that must be read from the source.
    """

    function: Callable[..., Any]
    model: Callable[[], nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    refused: tuple[str, str, str] | None = None
    reads: dict[str, str] = field(default_factory=dict)
    training: bool = False
    partly: str = ""
    longest: int = 14

    @property
    def name(self) -> str:
        """The function's name in words."""
        return self.function.__name__.replace("_", " ")
