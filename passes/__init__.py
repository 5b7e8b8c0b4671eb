"""Recognisers and rewrites, one file each; a rewrite registers by being a Rewrite subclass in a family folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subquad.ir.rewrite import Rewrite


@lru_cache(maxsize=1)
def discover() -> dict[str, type[Rewrite]]:
    """Every rewrite by name, found by importing the modules of the family folders."""
    from subquad.ir.rewrite import Rewrite

    found: dict[str, type[Rewrite]] = {}
    for module_info in pkgutil.walk_packages(__path__, prefix=__name__ + "."):
        if module_info.ispkg:
            continue
        module = importlib.import_module(module_info.name)
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, Rewrite) and not inspect.isabstract(value) and value.__module__ == module.__name__:
                if value.name in found and found[value.name] is not value:
                    raise RuntimeError(f"two rewrites are named {value.name!r}: {found[value.name]} and {value}")
                found[value.name] = value
    return dict(sorted(found.items()))
