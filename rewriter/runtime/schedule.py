"""The order in which a decoder's programs run: entry, blocks, tail, with what each call reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from subquad.kernels.direct import direct

Runner = Callable[[list[Tensor]], list[Tensor]]


class Varying(NamedTuple):
    """A size that differs from call to call: an example of it, and the largest it becomes (None: without limit)."""

    example: int
    most: int | None = None


@dataclass(frozen=True)
class InputForm:
    """The dtype of one input of a program and, per axis, its size."""

    dtype: torch.dtype
    sizes: tuple[int | Varying, ...]


@dataclass(eq=False)
class Program:
    """A graph whose inputs are, in order, the stream (an entry: the shared inputs), side values, weights and states.

    key: hash of its operations, wiring and constants.  counts: (sides, weights, states); for an entry (shared inputs,
    weights, 0).  fresh: recurrent state tensors it returns behind the stream.  weights: an entry's weight names.
    """

    graph: torch.fx.Graph
    counts: tuple[int, ...]
    fresh: int
    weights: tuple[str, ...] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.key = graph_key(self.graph)

    def eager(self) -> Runner:
        """Run the graph operation by operation, without gradients; its operators are called as functions."""
        return _runner(self.graph, direct())

    def traced(self) -> Runner:
        """The same with the operators as they are, so that fake tensors may run through."""
        return _runner(self.graph, {})

    def differentiable(self) -> Runner:
        """The same in float32 throughout, with gradients."""
        wide = torch.fx.Graph()
        wide.output(wide.graph_copy(self.graph, {}))
        for node in wide.nodes:
            node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), _widened)  # type: ignore[assignment]
        return _runner(wide, {torch.ops.subquad.narrow_linear.default: torch.nn.functional.linear})


def _widened(argument: Any) -> Any:
    return torch.float32 if argument in (torch.bfloat16, torch.float16) else argument


def _runner(graph: torch.fx.Graph, functions: Mapping[Any, Callable[..., Any]]) -> Runner:
    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        if node.target in functions:
            node.target = functions[node.target]
    forward = torch.fx.GraphModule(torch.nn.Module(), copy).forward
    return lambda inputs: list(forward(*inputs))


def graph_key(graph: torch.fx.Graph) -> str:
    """Hash of a graph's operations, wiring and constants, blind to node names."""
    names: dict[torch.fx.Node, str] = {}
    lines = []
    for n, node in enumerate(graph.nodes):
        names[node] = f"%{n}"
        arguments: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda m: _Reference(names[m]))  # type: ignore[arg-type, return-value]
        target = node.name if node.op == "placeholder" else _spelling(node.target)
        lines.append(f"{node.op} {target} {arguments!r}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def _spelling(target: Any) -> str:
    named = callable(target) and not isinstance(target, torch._ops.OpOverload)
    return f"{target.__module__}.{target.__qualname__}" if named else str(target)


@dataclass(frozen=True)
class _Reference:
    name: str

    def __repr__(self) -> str:
        return self.name


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
    on the last token only.  forms: the inputs of each program by key, which compiling needs; empty until they are known.
    """

    entry: Program
    calls: list[Call]
    raw: tuple[str, ...]
    tail: int
    forms: dict[str, tuple[InputForm, ...]] = field(default_factory=dict)

    def programs(self) -> list[Program]:
        """The distinct programs, the entry first, then by the number of their calls, most first."""
        count: dict[str, int] = {}
        found: dict[str, Program] = {}
        for call in self.calls:
            count[call.program.key] = count.get(call.program.key, 0) + 1
            found[call.program.key] = call.program
        return [self.entry, *sorted(found.values(), key=lambda p: -count[p.key])]
