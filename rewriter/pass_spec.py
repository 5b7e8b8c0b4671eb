"""Read a pass from its written form: `family:name(knob=value, …)`, `family:name,knob=value,…` or `family`."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from subquad.ir.errors import PassError, did_you_mean
from subquad.ir.loop_rewrite import LoopRewrite, Pass
from subquad.ir.network_rewrite import NetworkRewrite
from subquad.ir.rewrite import Rewrite
from subquad.passes import discover

DEFAULTS = {"linearize": "linearize:lolcats"}
"""The method that a family's bare name stands for."""


def parse_pass(text: str | Pass) -> Pass:
    """The rewrite that a written pass names, with its knobs set.

    Raises PassError for an unknown pass or knob (suggesting the nearest) and for a value the knob cannot take.
    """
    if isinstance(text, Pass):
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


class Request(NamedTuple):
    """The passes that are asked for: rewrites of sites in order, one of the decoding loop and one of the network at most."""

    sites: list[Rewrite]
    loop: LoopRewrite | None
    network: NetworkRewrite | None


def parse_request(passes: str | Pass | Iterable[str | Pass]) -> Request:
    """One or several written forms by what they rewrite; raises PassError for two of the loop or of the network."""
    parsed = [parse_pass(item) for item in ([passes] if isinstance(passes, (str, Pass)) else passes)]
    loops = [found for found in parsed if isinstance(found, LoopRewrite)]
    networks = [found for found in parsed if isinstance(found, NetworkRewrite)]
    for what, found in (("decoding loop", loops), ("network", networks)):
        if len(found) > 1:
            raise PassError(f"{found[0]} and {found[1]} both rewrite the {what}; name one.")
    sites = [found for found in parsed if isinstance(found, Rewrite)]
    return Request(sites, loops[0] if loops else None, networks[0] if networks else None)


def parse_passes(passes: str | Pass | Iterable[str | Pass]) -> list[Rewrite]:
    """A list of rewrites of sites from one or several written forms."""
    sites, loop, network = parse_request(passes)
    if (other := loop or network) is not None:
        raise PassError(f"{other.name} rewrites no attention site; give it to subquad.rewrite.")
    return sites


def make_pass(name: str, knobs: dict[str, Any]) -> Pass:
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
