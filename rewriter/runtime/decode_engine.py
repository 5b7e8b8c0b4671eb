"""Run a decoder's programs over a state: prefill, steps of any width, rollback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.schedule import Runner, Schedule
from subquad.runtime.state import DecoderState, cut_back, new_state, remember, reserve
from subquad.runtime.step_graph import StepGraph


@dataclass(frozen=True)
class Executor:
    """A schedule with a runner and the weight tensors of each of its programs; immutable once made."""

    schedule: Schedule
    entry: Runner
    entry_weights: tuple[Tensor, ...]
    calls: tuple[tuple[Runner, tuple[int, ...], tuple[Tensor, ...], tuple[str, ...], int], ...]


def executor(
    schedule: Schedule, weights: Mapping[str, Tensor], runners: Mapping[str, Runner] | None = None
) -> Executor:
    """Bind a schedule to weights; programs without a runner (by key) run operation by operation."""
    runners = runners or {}
    eager: dict[str, Runner] = {program.key: program.eager() for program in schedule.programs()}

    def find(key: str) -> Runner:
        return runners.get(key) or eager[key]

    calls = tuple(
        (find(c.program.key), c.sides, tuple(weights[name] for name in c.weights), c.states, c.program.fresh)
        for c in schedule.calls
    )
    entry = schedule.entry
    return Executor(schedule, find(entry.key), tuple(weights[name] for name in entry.weights), calls)


class DecodeEngine:
    """Runs a StepGraph.  It holds no state of any call, so threads may share it.

    step, first: executors for any width after, and at, the start.  one: executor for a single row and token, None until it
    is compiled; assigning it switches over at the next call.
    """

    def __init__(self, graph: StepGraph, step: Executor, first: Executor, device: torch.device) -> None:
        self.graph, self.step, self.first, self.device = graph, step, first, device
        self.one: Executor | None = None

    def start(self, batch: int, capacity: int) -> DecoderState:
        """An empty state."""
        return new_state(self.graph, batch, capacity, self.device)

    def run(self, state: DecoderState, ids: Tensor, mask: Tensor | None = None, last_only: bool = True) -> Tensor:
        """Append tokens ids [B, w] (mask [B, w], 1 for real tokens) and return logits [B, 1 or w, vocabulary].

        Raises GenerationError when the ids do not fit the state or the model's position table.
        """
        batch, width = ids.shape
        before, total = state.length, state.length + width
        if batch != state.batch or width == 0:
            raise GenerationError(f"a step of shape {list(ids.shape)} does not fit a state of {state.batch} rows.")
        if self.graph.limit is not None and total > self.graph.limit:
            raise GenerationError(
                f"{total} tokens were asked of a model whose position table has {self.graph.limit} rows."
            )
        with torch.inference_mode():
            reserve(state, total)
            remember(state)
            self._write(state, ids, mask, before, total)
            shared = self._shared(state, before, total)
            one = self.one
            if before == 0:
                chosen = self.first
            else:
                chosen = one if one is not None and batch == width == 1 else self.step
            logits = _execute(chosen, shared, _named_states(self.graph, state), state, last_only)
            state.length = total
        return logits

    def probe(self, chosen: Executor, state: DecoderState, ids: Tensor, length: int) -> Tensor:
        """Run one step of an executor as if `length` tokens had come before; the state is of no use afterwards."""
        self._write(state, ids, None, length, length + 1)
        shared = self._shared(state, length, length + 1)
        return _execute(chosen, shared, _named_states(self.graph, state), state, True)

    def rollback(self, state: DecoderState, columns: int) -> None:
        """Take back the last `columns` tokens of every row; recurrent states are recomputed from the nearest checkpoint."""
        with torch.inference_mode():
            tokens = dict(state.tokens.items())
            target = cut_back(self.graph, state, columns)
            if state.length < target:
                names = list(self.graph.inputs)
                ids = tokens[names[0]][:, state.length : target]
                mask = tokens[names[1]][:, state.length : target] if len(names) > 1 else None
                self.run(state, ids, mask)

    def _write(self, state: DecoderState, ids: Tensor, mask: Tensor | None, before: int, total: int) -> None:
        names = self.graph.inputs
        state.tokens[names[0]][:, before:total] = ids
        if mask is not None and len(names) == 1 and not bool((mask != 0).all()):
            raise GenerationError(
                "the model takes no attention mask, so padded rows cannot be decoded; give rows of one length."
            )
        for name in names[1:]:
            state.tokens[name][:, before:total] = 1 if mask is None else mask

    def _shared(self, state: DecoderState, before: int, total: int) -> dict[str, Tensor]:
        shared = {name: state.tokens[name][:, before:total] for name in self.graph.inputs}
        shared["columns"], shared["slots"] = state.arange[before:total], state.arange[:total]
        if self.graph.history is not None:
            values = self.graph.history(*(state.tokens[name][:, :total] for name in self.graph.inputs))
            for n in range(self.graph.tables):
                shared[f"table_{n}"] = values[n].contiguous()
            for n, axis in enumerate(self.graph.past_axes):
                shared[f"past_{n}"] = values[self.graph.tables + n].narrow(axis, before, total - before).contiguous()
        return shared


def _execute(
    chosen: Executor, shared: dict[str, Tensor], tensors: dict[str, Tensor], state: DecoderState, last_only: bool
) -> Tensor:
    schedule = chosen.schedule
    stream, *sides = chosen.entry([*shared.values(), *chosen.entry_weights])
    sides += [shared[name] for name in schedule.raw]
    fresh: dict[str, Tensor] = {}
    for n, (runner, used, weights, names, returned) in enumerate(chosen.calls):
        if n == schedule.tail and last_only:
            stream = stream[:, -1:]
        outputs = runner([stream, *(sides[i] for i in used), *weights, *(tensors[name] for name in names)])
        stream = outputs[0]
        if returned:
            recurrent = [name for name in names if name[0] in "sw"]
            fresh.update(zip(_in_order(recurrent), outputs[1:], strict=True))
    if fresh:
        sites = sorted({int(name.rpartition("_")[2]) for name in fresh})
        state.recurrent = [tuple(fresh[f"{kind}_{site}"] for kind in RECURRENT) for site in sites]
    return stream[:, -1:] if last_only else stream


RECURRENT = ("state", "window_k", "window_v", "seen")


def _in_order(names: Sequence[str]) -> list[str]:
    """State names in the order in which a program returns them: by site, then state, window_k, window_v, seen."""
    return sorted(names, key=lambda name: (int(name.rpartition("_")[2]), RECURRENT.index(name.rpartition("_")[0])))


def _named_states(graph: StepGraph, state: DecoderState) -> dict[str, Tensor]:
    """The state tensors by placeholder name."""
    segment, named, kv, recurrent = state.segments[-1], {}, 0, 0
    for n, site in enumerate(graph.sites):
        if site.kind == "kv":
            named[f"k_{n}"], named[f"v_{n}"] = segment.k[kv], segment.v[kv]
            kv += 1
        else:
            named.update((f"{name}_{n}", t) for name, t in zip(RECURRENT, state.recurrent[recurrent], strict=True))
            recurrent += 1
    return named
