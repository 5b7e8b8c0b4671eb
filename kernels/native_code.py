"""Holds the library of C++ forms once it is loaded, so that operators outside compiled programs can call them."""

from __future__ import annotations

import ctypes
from pathlib import Path

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
"""The C++ files of the library."""
_loaded: list[ctypes.CDLL] = []


def provide_library(library: ctypes.CDLL) -> None:
    """Use this library from now on."""
    _loaded[:] = [library]


def library() -> ctypes.CDLL | None:
    """The library, None until it was built and loaded."""
    return _loaded[0] if _loaded else None
