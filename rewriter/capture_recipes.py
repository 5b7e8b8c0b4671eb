"""Describe an object of any class by the tensors in it and by how it is put together again from others."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, str, bool, bytes, complex, type(None))
KEPT = (torch.nn.Module, types.FunctionType, types.MethodType, types.ModuleType, type, torch.dtype, torch.device)
"""What an object may hold that is never looked into: it is the same object after every call."""


@dataclass(eq=False)
class Recipe:
    """How an object is rebuilt from the tensors and symbolic numbers in it; everything else in it is kept as captured."""

    name: str
    description: Any

    def rebuild(self, leaves: Any, into: Any = None) -> Any:
        """The object with other leaves in the places of the captured ones; into: one of its class, changed to be it."""
        return _rebuilt(self.description, list(leaves), {}, into)

    def fits(self, other: Recipe) -> bool:
        """True when the other's object differs from this one's in its tensors alone."""
        try:
            return bool(_plain(self.description) == _plain(other.description))
        except Exception:  # what it holds cannot be compared
            return False


class Returned(Recipe):
    """The recipe of a call's output behind the objects that the call was given, as the call leaves them."""

    def rebuild(self, leaves: Any, into: Any = None) -> Any:
        """The output; into: the objects that the call was given, which are changed as the call does."""
        return super().rebuild(leaves, None if into is None else (*into, None))[-1]


def described(value: Any, leaves: list[Any], own: frozenset[int] = frozenset()) -> Recipe:
    """The recipe of an object; its tensors and symbolic numbers are appended to `leaves`.

    own: identities of the tensors that objects held before; these stay, whatever was written into them.
    """
    return Recipe(type(value).__name__, _described(value, leaves, {}, own))


def _described(value: Any, leaves: list[Any], seen: dict[int, Any], own: frozenset[int]) -> Any:
    """Nested ("leaf" | "own", n), ("kept", value), ("sequence" | "named" | "dict" | "object", identity, class, parts).

    An own tensor is the one that the object held before, with other content at most.
    """
    if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        leaves.append(value)
        return "own" if id(value) in own else "leaf", len(leaves) - 1
    if isinstance(value, (*PLAIN, *KEPT)):
        return "kept", value
    if id(value) in seen:
        return "again", id(value)
    seen[id(value)] = value
    if isinstance(value, list | tuple | set | frozenset):
        word = "named" if hasattr(value, "_fields") else "sequence"
        return word, id(value), type(value), [_described(item, leaves, seen, own) for item in value]
    if isinstance(value, dict):
        parts = {key: _described(item, leaves, seen, own) for key, item in value.items()}
        return "dict", id(value), type(value), parts, _attributes(value, leaves, seen, own)
    attributes = _attributes(value, leaves, seen, own)
    return ("object", id(value), type(value), attributes) if attributes else ("kept", value)


def _attributes(value: Any, leaves: list[Any], seen: dict[int, Any], own: frozenset[int]) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    held = dict(getattr(value, "__dict__", {})) | {name: getattr(value, name) for name in slots if name[:2] != "__"}
    return {name: _described(item, leaves, seen, own) for name, item in held.items()}


def _rebuilt(description: Any, leaves: list[Any], made: dict[int, Any], into: Any) -> Any:
    word = description[0]
    if word == "own" and isinstance(into, torch.Tensor):
        return into
    if word in ("leaf", "own"):
        return leaves[description[1]]
    if word == "kept":
        return description[1]
    if word == "again":
        return made[description[1]]
    identity, kind, parts = description[1:4]
    held = into if type(into) is kind else None
    if word in ("sequence", "named"):
        fresh: Any = (held if held is not None else []) if kind is list else None
        made[identity] = fresh
        before = (
            list(held)
            if kind in (list, tuple) and held is not None and len(held) == len(parts)
            else [None] * len(parts)
        )
        values = [_rebuilt(part, leaves, made, old) for part, old in zip(parts, before, strict=True)]
        if kind is list:
            fresh[:] = values
        else:
            made[identity] = kind(*values) if word == "named" else kind(values)
        return made[identity]
    made[identity] = fresh = kind.__new__(kind) if held is None else held
    if word == "dict":
        for key, part in parts.items():
            dict.__setitem__(fresh, key, _rebuilt(part, leaves, made, fresh.get(key)))
        parts = description[4]
    for name, part in parts.items():
        object.__setattr__(fresh, name, _rebuilt(part, leaves, made, getattr(held, name, None)))
    return fresh


def _plain(description: Any) -> Any:
    """A description without identities, which differ between equal objects."""
    word = description[0]
    if word in ("leaf", "own", "kept", "again"):
        return ("leaf", description[1]) if word == "own" else (word, None if word == "again" else description[1])
    parts: Any = description[3]
    plain: Any
    if isinstance(parts, dict):
        plain = {key: _plain(part) for key, part in parts.items()}
    else:
        plain = [_plain(part) for part in parts]
    more = {key: _plain(part) for key, part in description[4].items()} if word == "dict" else None
    return word, description[2], plain, more
