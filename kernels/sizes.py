"""Answers questions about sizes that may be symbolic; plain numbers need none of torch's symbolic machinery."""

from __future__ import annotations

from typing import Any


def surely(question: Any) -> bool:
    """True when a comparison of sizes holds for certain; a symbolic one is not guarded on."""
    if isinstance(question, bool):
        return question
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(question)


def guarded(question: Any) -> bool:
    """The answer for the sizes at hand, as a guard where they are symbolic; False where it cannot be told."""
    if isinstance(question, bool):
        return question
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(question)
