"""The order in which a decoder's programs run: entry, blocks, tail, with what each call reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.fx
from torch import Tensor

Runner = Callable[[list[Tensor]], list[Tensor]]


@dataclass(eq=False)
class Program:
    """A graph whose inputs are, in order, the stream (an entry: the shared inputs), side values, weights and states.

    key: hash of its operations, wiring and constants.  counts: (sides, weights, states); for an entry (shared inputs,
    weights, 0).  fresh: recurrent state tensors it returns behind the stream.  weights: an entry's weight names.
    """

    graph: torch.fx.GraphModule
    key: str
    counts: tuple[int, ...]
    fresh: int
    weights: tuple[str, ...] = ()

    def eager(self) -> Runner:
        """Run the graph operation by operation."""
        graph = self.graph
        return lambda inputs: list(graph(*inputs))


@dataclass(frozen=True)
class Call:
    """One call of a program: indices of its side values, names of its weights, and its states as `<name>_<site>`."""

    program: Program
    sides: tuple[int, ...]
    weights: tuple[str, ...]
    states: tuple[str, ...]


@dataclass
class Schedule:
    """entry: shared inputs → (stream, side values ...).  raw: shared inputs that calls read directly; their side indices
    follow the entry's.  calls: stream → stream; from index `tail` on no call has state or side values, so that it may run
    on the last token only.
    """

    entry: Program
    calls: list[Call]
    raw: tuple[str, ...]
    tail: int

    def programs(self) -> list[Program]:
        """The distinct programs, the entry first, then by the number of their calls, most first."""
        count: dict[str, int] = {}
        found: dict[str, Program] = {}
        for call in self.calls:
            count[call.program.key] = count.get(call.program.key, 0) + 1
            found[call.program.key] = call.program
        return [self.entry, *sorted(found.values(), key=lambda p: -count[p.key])]
