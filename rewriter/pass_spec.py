"""Read a pass from its written form: `family:name(knob=value, …)`, `family:name,knob=value,…` or `family`."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from subquad.ir.errors import PassError, did_you_mean
from subquad.ir.rewrite import Rewrite
from subquad.passes import discover

DEFAULTS = {"linearize": "linearize:lolcats"}
"""The method that a family's bare name stands for."""


def parse_pass(text: str | Rewrite) -> Rewrite:
    """The rewrite that a written pass names, with its knobs set.

    Raises PassError for an unknown pass or knob (suggesting the nearest) and for a value the knob cannot take.
    """
    if isinstance(text, Rewrite):
        return text
    written = text.strip()
    if "(" in written:
        if not written.endswith(")"):
            raise PassError(f"the pass {text!r} opens a parenthesis that it does not close.")
        name, _, inside = written[:-1].partition("(")
        parts = [part for part in inside.split(",") if part.strip()]
    else:
        name, *parts = written.split(",")
    knobs: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise PassError(f"the knob {part.strip()!r} of pass {text!r} has no value; write knob=value.")
        knobs[key.strip()] = _literal(value.strip())
    return make_pass(name.strip(), knobs)


def parse_passes(passes: str | Rewrite | Iterable[str | Rewrite]) -> list[Rewrite]:
    """A list of passes from one or several written forms."""
    if isinstance(passes, (str, Rewrite)):
        return [parse_pass(passes)]
    return [parse_pass(item) for item in passes]


def make_pass(name: str, knobs: dict[str, Any]) -> Rewrite:
    """The rewrite `name` with the given knob values; raises PassError as parse_pass does."""
    known = discover()
    kind = known.get(DEFAULTS.get(name, name))
    if kind is None:
        raise PassError(f"there is no pass {name!r}; {did_you_mean(name, known)}")
    names = {field.name for field in fields(kind)}
    for key in knobs:
        if key not in names:
            raise PassError(f"pass {kind.name!r} has no knob {key!r}; {did_you_mean(key, names)}")
    try:
        return kind(**knobs)
    except (TypeError, ValueError) as error:
        raise PassError(f"pass {kind.name!r} does not take these knobs: {error}") from error


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
