"""Where the logits and a cache lie in what a model returns: nowhere deeper than an item, a key or an attribute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subquad.capture_objects import tensors_of
from subquad.ir.errors import CaptureError


@dataclass(frozen=True)
class Attribute:
    """A place in an object that is neither a mapping nor a sequence."""

    name: str


WHOLE = ()
"""The place of an output that is the logits themselves."""


def places(out: Any) -> Iterator[tuple[Any, Any]]:
    """(place, value) of everything in an output."""
    if isinstance(out, dict):
        yield from out.items()
    elif type(out) in (tuple, list):
        yield from enumerate(out)
    elif not isinstance(out, Tensor):
        yield from ((Attribute(name), value) for name, value in getattr(out, "__dict__", {}).items())


def logits_place(out: Any) -> Any:
    """Where the logits lie.  Raises CaptureError when no place can hold them."""
    if isinstance(out, Tensor):
        return WHOLE
    named = [place for place, value in places(out) if place in ("logits", Attribute("logits")) and _is_logits(value)]
    found = named or [place for place, value in places(out) if isinstance(place, int) and _is_logits(value)]
    if found:
        return found[0]
    raise CaptureError(f"the model returns a {type(out).__name__} in which the logits are not found.")


def _is_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (2, 3)


def at(out: Any, place: Any) -> Any:
    """What lies at a place of an output."""
    if place == WHOLE:
        return out
    return getattr(out, place.name) if isinstance(place, Attribute) else out[place]


def without_tensors(out: Any) -> Any:
    """An output of the same kind that holds no tensor: None stands for whatever had one in it."""
    if isinstance(out, Tensor):
        return None
    if isinstance(out, dict):
        return type(out)()
    if type(out) in (tuple, list):
        return type(out)(_plain(item) for item in out)
    made = copy.copy(out)
    made.__dict__.update({name: _plain(value) for name, value in out.__dict__.items()})
    return made


def _plain(value: Any) -> Any:
    return None if isinstance(value, Tensor) or tensors_of(value) else value


def filled(template: Any, values: dict[Any, Any]) -> Any:
    """An output like the template with these values, by their places."""
    if WHOLE in values:
        return values[WHOLE]
    if type(template) in (tuple, list):
        return type(template)(values.get(n, item) for n, item in enumerate(template))
    made = copy.copy(template)
    for place, value in values.items():
        if isinstance(place, Attribute):
            setattr(made, place.name, value)
        else:
            made[place] = value
    return made


def spellings(place: Any, out: Any = None) -> frozenset[str]:
    """How source code reads a place, in the words of `Reading.uses`; a mapping's values by number too, as in the output `out`."""
    if place == WHOLE:
        return frozenset()
    name = place.name if isinstance(place, Attribute) else place
    found = {"logits"} if name == "logits" else {f"attribute {name}", f"item {name!r}"}
    if isinstance(out, dict) and name in out:
        found.add(f"item {list(out).index(name)}")
    return frozenset(found | ({"item 0"} if name == "logits" else set()))
