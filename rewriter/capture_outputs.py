"""Let torch.export take outputs that are objects of any class: they travel as tensors and are rebuilt at every call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from subquad.capture_by_size import recomputed
from subquad.capture_inputs import one_batch
from subquad.capture_objects import Objects, returned
from subquad.capture_recipes import PLAIN, Recipe, described
from subquad.capture_tables import AssignedAttributes, Tables, attributes_kept
from subquad.capture_values import ValueReads


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
    """The names of the classes that were packed while a forward was captured, and of the tables that it filled."""

    classes: set[str] = field(default_factory=set)
    tables: tuple[str, ...] = ()


@contextmanager
def adapted_forward(
    model: torch.nn.Module,
    bound: dict[str, Any],
    shapes: Any = None,
    reads: ValueReads | None = None,
    objects: Objects | None = None,
    tables: Tables | None = None,
) -> Iterator[Adapted]:
    """Inside the block the forward of `model` takes from torch.export and gives it only what that can take.

    bound: keyword arguments that the forward gets beside those it is called with.  shapes: the symbolic axes of its tensors;
    first axes of one size in the example are one batch.  reads: where the capture answers reads of values, the tensors read
    follow the output.  objects: arguments that arrive as lists of tensors; what the forward leaves in them follows, too.
    tables: plain attributes that are missing when the forward begins; what it fills them with follows behind all else.
    Plain attributes are as before when it has run; raises AssignedAttributes where it assigned others a tensor.
    """
    found = Adapted()
    forward, objects = model.forward, objects or Objects()
    held = "forward" in model.__dict__

    @functools.wraps(forward)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        one_batch((args, kwargs), shapes)
        before = [leaf for leaves in objects.among(args, kwargs) for leaf in leaves]
        args, kwargs = objects.restored(args, kwargs)
        with attributes_kept(model) as kept, nullcontext() if tables is None else tables.missing():
            output = forward(*args, **kwargs, **bound)
            made = kept.tensors()
        unknown = [name for name in made if tables is None or name not in tables.names]
        if unknown:
            raise AssignedAttributes(
                f"the forward assigns a tensor to {', '.join(f'`{name}`' for name in unknown)}, which a later call may read; "
                "register a buffer, or return it."
            )
        if objects.recipes:
            output = Packed(*returned(output, objects.among(args, kwargs), before))
        else:
            output = pytree.tree_map(functools.partial(_packed, found=found), output)
        beside = [] if reads is None else [tensor for tensor, _ in reads.answered]
        found.tables = tuple(name for name, tensors in made.items() for _ in tensors)
        filled = [tensor for tensors in made.values() for tensor in tensors]
        return (output, [*beside, *filled]) if reads is not None or filled else output

    adapted.__signature__ = _named(inspect.signature(forward), shapes)  # type: ignore[attr-defined]
    model.__dict__["forward"] = adapted
    try:
        with recomputed(model):
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
    recipe = described(value, leaves)
    found.classes.add(type(value).__name__)
    return Packed(leaves, recipe)
