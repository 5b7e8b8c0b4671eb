"""Let torch.export take outputs that are objects of any class: they travel as tensors and are rebuilt at every call."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from subquad.capture_inputs import one_batch
from subquad.capture_values import ValueReads

PLAIN = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, str, bool, bytes, complex, type(None))
KEPT = (torch.nn.Module, types.FunctionType, types.MethodType, types.ModuleType, type, torch.dtype, torch.device)
"""What an object may hold that is never looked into: it is the same object after every call."""


@dataclass(eq=False)
class Recipe:
    """How an object is rebuilt from the tensors and symbolic numbers in it; everything else in it is kept as captured."""

    name: str
    description: Any

    def rebuild(self, leaves: Any) -> Any:
        """The object with other leaves in the places of the captured ones."""
        return _rebuilt(self.description, list(leaves), {})


class Packed:
    """The leaves of an object that torch's trees do not know, with its recipe; unflattening gives the object itself."""

    def __init__(self, leaves: list[Any], recipe: Recipe) -> None:
        self.leaves, self.recipe = leaves, recipe


pytree.register_pytree_node(
    Packed,
    lambda packed: (packed.leaves, packed.recipe),
    lambda leaves, recipe: recipe.rebuild(leaves),
    serialized_type_name="subquad.Packed",
    to_dumpable_context=lambda recipe: recipe.name,
    from_dumpable_context=lambda name: Recipe(name, ("kept", None)),
)


@dataclass
class Adapted:
    """The names of the classes that were packed while a forward was captured."""

    classes: set[str] = field(default_factory=set)


@contextmanager
def adapted_forward(
    model: torch.nn.Module, bound: dict[str, Any], shapes: Any = None, reads: ValueReads | None = None
) -> Iterator[Adapted]:
    """Inside the block the forward of `model` gives torch.export only what it can take; its signature stays.

    bound: keyword arguments that the forward gets beside those it is called with.  shapes: the symbolic axes of its tensors;
    first axes of one size in the example are one batch.  reads: where the capture answers reads of values, the tensors read
    follow the output.
    """
    found = Adapted()
    forward = model.forward
    held = "forward" in model.__dict__

    @functools.wraps(forward)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        one_batch((args, kwargs), shapes)
        output = pytree.tree_map(functools.partial(_packed, found=found), forward(*args, **kwargs, **bound))
        return output if reads is None else (output, [tensor for tensor, _ in reads.answered])

    adapted.__signature__ = _named(inspect.signature(forward), shapes)  # type: ignore[attr-defined]
    model.__dict__["forward"] = adapted
    try:
        yield found
    finally:
        if held:
            model.__dict__["forward"] = forward
        else:
            del model.__dict__["forward"]


def _named(signature: inspect.Signature, shapes: Any) -> inspect.Signature:
    """The signature with the given extra keywords in the place of `**kwargs`, whose shapes torch.export does not match."""
    given = () if shapes is None else shapes[1]
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(kept) < len(signature.parameters):
        known = {p.name for p in kept}
        kept += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in given if name not in known]
    return signature.replace(parameters=kept)


def _packed(value: Any, found: Adapted) -> Any:
    if isinstance(value, PLAIN):
        return value
    leaves: list[Any] = []
    recipe = Recipe(type(value).__name__, _described(value, leaves, {}))
    found.classes.add(type(value).__name__)
    return Packed(leaves, recipe)


def _described(value: Any, leaves: list[Any], seen: dict[int, Any]) -> Any:
    """Nested ("leaf", n), ("kept", value), ("list" | "tuple" | "dict" | "object", identity, class, parts)."""
    if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        leaves.append(value)
        return "leaf", len(leaves) - 1
    if isinstance(value, (*PLAIN, *KEPT)):
        return "kept", value
    if id(value) in seen:
        return "again", id(value)
    seen[id(value)] = value
    if isinstance(value, list | tuple | set | frozenset):
        word = "named" if hasattr(value, "_fields") else "sequence"
        return word, id(value), type(value), [_described(item, leaves, seen) for item in value]
    if isinstance(value, dict):
        parts = {key: _described(item, leaves, seen) for key, item in value.items()}
        return "dict", id(value), type(value), parts, _attributes(value, leaves, seen)
    attributes = _attributes(value, leaves, seen)
    return ("object", id(value), type(value), attributes) if attributes else ("kept", value)


def _attributes(value: Any, leaves: list[Any], seen: dict[int, Any]) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    held = dict(getattr(value, "__dict__", {})) | {name: getattr(value, name) for name in slots if name[:2] != "__"}
    return {name: _described(item, leaves, seen) for name, item in held.items()}


def _rebuilt(description: Any, leaves: list[Any], made: dict[int, Any]) -> Any:
    word = description[0]
    if word == "leaf":
        return leaves[description[1]]
    if word == "kept":
        return description[1]
    if word == "again":
        return made[description[1]]
    identity, kind, parts = description[1:4]
    if word in ("sequence", "named"):
        items: Any = [] if kind is list else None
        made[identity] = items
        values = [_rebuilt(part, leaves, made) for part in parts]
        made[identity] = kind(*values) if word == "named" else kind(values)
        return made[identity]
    made[identity] = fresh = kind.__new__(kind)
    if word == "dict":
        for key, part in parts.items():
            dict.__setitem__(fresh, key, _rebuilt(part, leaves, made))
        parts = description[4]
    for name, part in parts.items():
        object.__setattr__(fresh, name, _rebuilt(part, leaves, made))
    return fresh
