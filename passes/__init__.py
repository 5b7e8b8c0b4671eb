"""Recognisers and rewrites, one file each; a rewrite registers by being a Pass subclass in a family folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subquad.ir.loop_rewrite import Pass
    from subquad.ir.rewrite import Rewrite


@lru_cache(maxsize=1)
def discover() -> dict[str, type[Pass]]:
    """Every rewrite by name, of sites and of loops, found by importing the modules of the family folders."""
    from subquad.ir.loop_rewrite import Pass

    found: dict[str, type[Pass]] = {}
    for module_info in pkgutil.walk_packages(__path__, prefix=__name__ + "."):
        if module_info.ispkg:
            continue
        module = importlib.import_module(module_info.name)
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, Pass) and not inspect.isabstract(value) and value.__module__ == module.__name__:
                if value.name in found and found[value.name] is not value:
                    raise RuntimeError(f"two rewrites are named {value.name!r}: {found[value.name]} and {value}")
                found[value.name] = value
    return dict(sorted(found.items()))


def of_sites() -> dict[str, type[Rewrite]]:
    """The rewrites of attention sites by name."""
    from subquad.ir.rewrite import Rewrite

    return {name: kind for name, kind in discover().items() if issubclass(kind, Rewrite)}
