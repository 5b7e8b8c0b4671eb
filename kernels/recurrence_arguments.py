"""Names the arguments of the recurrence operator, and orders the gradients of those that have one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

STATE = ("state", "window_k", "window_v", "seen")
TOKENS = ("q", "k", "v", "decay", "beta", "valid")
"""Arguments with a token axis; decay has none where it is one number per head."""
DIFFERENTIABLE = (
    "q", "k", "v", "decay", "beta", "feature_q", "feature_k", "window_gate", "state", "window_k", "window_v",
)  # fmt: skip
Arguments = dict[str, Any]


def differentiable(arguments: Arguments) -> list[Tensor]:
    """The floating inputs that are present, parameters of the feature maps one by one, in argument order."""
    return flat_gradients({name: arguments[name] for name in DIFFERENTIABLE if arguments[name] is not None})


def flat_gradients(named: dict[str, Any]) -> list[Tensor]:
    """The tensors of `named` in the order of `differentiable`."""
    found: list[Tensor] = []
    for name in DIFFERENTIABLE:
        value = named.get(name, [])
        found.extend(value if isinstance(value, list | tuple) else [value])
    return found


def named_gradients(arguments: Arguments, flat: Sequence[Tensor]) -> dict[str, Any]:
    """The inverse of `flat_gradients` for the inputs present in `arguments`."""
    left = list(flat)
    named: dict[str, Any] = {}
    for name in DIFFERENTIABLE:
        value = arguments[name]
        if isinstance(value, list | tuple):
            named[name] = [left.pop(0) for _ in value]
        elif value is not None:
            named[name] = left.pop(0)
    return named
