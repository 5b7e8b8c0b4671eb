"""A decoding loop, as found in a graph, a while_loop, a Python function or a `generate` method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Loop:
    """One autoregressive loop: what is carried, what chooses the next token, and when it stops.

    path: where it was found.  origin: "generate" | "while_loop" | "unrolled" | "function".  state: names of carried values.
    sampler: how the next token is chosen.  stop: the stopping rule in words.  evidence: what each slot was read from.
    """

    path: str
    origin: str
    state: tuple[str, ...]
    sampler: str
    stop: str
    evidence: tuple[str, ...] = field(default=())

    def json(self) -> dict[str, Any]:
        """The public words of a loop."""
        return {
            "path": self.path,
            "origin": self.origin,
            "state": list(self.state),
            "sampler": self.sampler,
            "stop": self.stop,
            "evidence": list(self.evidence),
        }
