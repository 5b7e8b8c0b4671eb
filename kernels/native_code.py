"""Holds the library of C++ forms once it is loaded, so that operators outside compiled programs can call them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
"""The C++ files of the library."""
_loaded: list[ctypes.CDLL] = []
_loader: list[Callable[[], object]] = []


def provide_library(library: ctypes.CDLL) -> None:
    """Use this library from now on."""
    _loaded[:] = [library]


def provide_loader(load: Callable[[], object]) -> None:
    """Call this when the library is first asked for; it provides the library, or does nothing where none was built."""
    _loader[:] = [load]


def library() -> ctypes.CDLL | None:
    """The library, None until it was built and loaded."""
    if _loader and not _loaded:
        _loader.pop()()
    return _loaded[0] if _loaded else None
