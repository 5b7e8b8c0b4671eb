"""The classes of calls for which a decoder is compiled: one token, a few tokens after others, and a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from subquad.kernels.recurrence_lanes import CHUNK


@dataclass(frozen=True)
class WidthClass:
    """Calls that share compiled programs.

    start: it takes calls on an empty state, otherwise calls after earlier tokens.  least, most: the rows times tokens of a
    call that it takes.
    """

    name: str
    start: bool
    least: int
    most: int

    def covers(self, before: int, rows: int) -> bool:
        """True for a call of `rows` tokens in all rows together after `before` columns."""
        return self.start == (before == 0) and self.least <= rows <= self.most


FEW = 64
"""Tokens up to which a step is compiled; at most one chunk of the recurrence."""
PROMPT = 512
"""Tokens up to which a prompt is compiled.  Compiled attention holds the scores of all its queries and keys; operation by
operation it goes through them in blocks."""


def width_classes(recurrent: bool) -> tuple[WidthClass, ...]:
    """The classes in the order in which they are compiled.

    recurrent: some site has a recurrent state.  Prompts are then compiled up to one chunk of the recurrence: a number of
    chunks that varies takes the compiler minutes (measured).
    """
    return (
        WidthClass("one", False, 1, 1),
        WidthClass("few", False, 2, FEW),
        WidthClass("first", True, 2, CHUNK if recurrent else PROMPT),
    )
