"""Holds the one slot through which a package above (code generation) offers compiled kernels to the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Provider = Callable[[str, dict[str, Any]], Any]
"""provider(operator name, arguments by name) -> the operator's outputs, or None if it has no kernel for them."""

_slot: list[Provider] = []


def provide(provider: Provider | None) -> None:
    """Put `provider` in the slot, replacing the one before; None empties it."""
    _slot[:] = [] if provider is None else [provider]


def provided() -> Provider | None:
    """The provider in the slot, or None."""
    return _slot[0] if _slot else None
