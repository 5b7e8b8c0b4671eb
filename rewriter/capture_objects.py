"""Let torch.export take arguments that are objects of any class, as caches are: they travel as lists of their tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from subquad.capture_recipes import KEPT, PLAIN, Recipe, Returned, described

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Objects:
    """The arguments of a forward that are objects with tensors in them: how each is rebuilt, by the argument's name.

    names: the forward's positional parameters in order.
    """

    names: tuple[str, ...] = ()
    recipes: dict[str, Recipe] = field(default_factory=dict)

    def as_tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments with every such object as the list of its tensors."""
        return self._changed(args, kwargs, lambda recipe, value: tensors_of(value))

    def copied(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments with a copy in the place of every such object: what is done to the object later leaves it alone."""
        return self._changed(args, kwargs, lambda recipe, value: recipe.rebuild(t.clone() for t in tensors_of(value)))

    def restored(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments with every such list as the object again, a new one at each call."""
        return self._changed(args, kwargs, lambda recipe, leaves: recipe.rebuild(leaves))

    def batch_and_length(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The symbolic axes of the arguments; those of a kept state [B, H, T, D] are batch and length at most."""
        return self._changed(args, kwargs, lambda recipe, axes: [_without_width(found) for found in axes])

    def among(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """What stands in the places of the objects, in a fixed order; None where an argument is not given."""
        named = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        return [named.get(name) for name in sorted(self.recipes)]

    def unlike(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """The name of the first argument that is not such an object as the captured one; None when all are."""
        for name, value in zip(sorted(self.recipes), self.among(args, kwargs), strict=True):
            if not self.recipes[name].fits(described(value, [])):
                return name
        return None

    def _changed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Any) -> Arguments:
        def one(name: str, value: Any) -> Any:
            return change(self.recipes[name], value) if name in self.recipes else value

        positional = [one(name, value) for name, value in zip(self.names, args, strict=False)]
        return (*positional, *args[len(positional) :]), {name: one(name, value) for name, value in kwargs.items()}


def objects_among(forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Objects:
    """The arguments of a call that are neither tensors nor containers of Python and that hold tensors."""
    parameters = inspect.signature(forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = tuple(positional)
    recipes = {}
    for name, value in (dict(zip(names, args, strict=False)) | dict(kwargs)).items():
        if not isinstance(value, (*PLAIN, *KEPT, list, tuple, dict, set)) and tensors_of(value):
            recipes[name] = described(value, [])
    return Objects(names, recipes)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in an object, in the order of its recipe."""
    leaves: list[Any] = []
    described(value, leaves)
    return leaves


def returned(output: Any, objects: list[Any], before: list[torch.Tensor]) -> tuple[list[Any], Returned]:
    """The leaves of an output and of the objects as the call leaves them, with their recipe.

    before: the tensors that the objects held.
    """
    leaves: list[Any] = []
    recipe = described((*objects, output), leaves, frozenset(map(id, before)))
    return leaves, Returned(type(output).__name__, recipe.description)


def _without_width(axes: dict[int, Any] | None) -> dict[int, Any] | None:
    return None if axes is None else {axis: size for axis, size in axes.items() if axis != 3}
