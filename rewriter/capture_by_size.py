"""Dictionaries and cached functions whose keys are sizes, which have no hash while a forward is captured."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


class BySize(dict[Any, Any]):
    """A dictionary whose keys may be symbolic sizes, which have no hash: a list of pairs, found by what is surely equal."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Any, Any]] = []

    def _place(self, key: Any) -> int | None:
        return next((n for n, (held, _) in enumerate(self.pairs) if _surely_equal(held, key)), None)

    def __contains__(self, key: Any) -> bool:
        return self._place(key) is not None

    def __getitem__(self, key: Any) -> Any:
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        return self.pairs[place][1]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs = [pair for pair in self.pairs if not _surely_equal(pair[0], key)] + [(key, value)]

    def get(self, key: Any, default: Any = None) -> Any:
        """As of any dictionary."""
        place = self._place(key)
        return default if place is None else self.pairs[place][1]


def _surely_equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_surely_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        symbols = [x.node.expr if isinstance(x, torch.SymInt) else x for x in (a, b)]
        return bool(symbols[0] == symbols[1])
    return bool(a == b)


@contextmanager
def recomputed(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block functions under `functools.lru_cache`, of the model's classes and of their files, compute every time.

    A symbolic size has no hash, and a result of the capture must not stay behind in the cache.
    """
    kinds = {
        kind for module in model.modules() for kind in type(module).__mro__ if kind.__module__.split(".")[0] != "torch"
    }
    files = {name: sys.modules.get(name) for name in {kind.__module__ for kind in kinds} - {"builtins"}}
    with ExitStack() as stack:
        for place in (*kinds - {object}, *(file for file in files.values() if file is not None)):
            for name, value in list(vars(place).items()):
                if isinstance(value, functools._lru_cache_wrapper) and value.__wrapped__.__module__ in files:
                    stack.enter_context(mock.patch.object(place, name, value.__wrapped__))
        yield
