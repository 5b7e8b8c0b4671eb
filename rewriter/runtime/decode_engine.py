"""Run a decoder's programs over a state: prefill, steps of any width, rollback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.layout import DecoderLayout
from subquad.runtime.schedule import Runner, Schedule
from subquad.runtime.state import DecoderState, cut_back, new_state, remember, reserve


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
    given = runners or {}
    found = {program.key: given.get(program.key) or program.eager() for program in schedule.programs()}
    calls = tuple(
        (found[c.program.key], c.sides, tuple(weights[name] for name in c.weights), c.states, c.program.fresh)
        for c in schedule.calls
    )
    entry = schedule.entry
    return Executor(schedule, found[entry.key], tuple(weights[name] for name in entry.weights), calls)


class DecodeEngine:
    """Runs a decoder.  It holds no state of any call, so threads may share it.

    eager: executors without compiled programs, "step" for any width after, and "first" for any width at, the start.
    compiled: executors by the name of their width class; adding one switches over at the next call.
    """

    def __init__(self, layout: DecoderLayout, eager: Mapping[str, Executor], device: torch.device) -> None:
        self.layout, self.eager, self.device = layout, eager, device
        self.compiled: dict[str, Executor] = {}

    def start(self, batch: int, capacity: int) -> DecoderState:
        """An empty state."""
        return new_state(self.layout, batch, capacity, self.device)

    def run(self, state: DecoderState, ids: Tensor, mask: Tensor | None = None, last_only: bool = True) -> Tensor:
        """Append tokens ids [B, w] (mask [B, w], 1 for real tokens) and return logits [B, 1 or w, vocabulary].

        Raises GenerationError when the ids do not fit the state or the model's position table.
        """
        batch, width = ids.shape
        before, total = state.length, state.length + width
        if batch != state.batch or width == 0:
            raise GenerationError(f"a step of shape {list(ids.shape)} does not fit a state of {state.batch} rows.")
        if self.layout.limit is not None and total > self.layout.limit:
            raise GenerationError(
                f"{total} tokens were asked of a model whose position table has {self.layout.limit} rows."
            )
        with torch.inference_mode():
            reserve(state, total)
            remember(state)
            self._write(state, ids, mask, before, total)
            shared = self._shared(state, before, total)
            chosen = self._chosen(before, batch * width)
            logits = _execute(chosen, shared, _named_states(self.layout, state), state, last_only)
            state.length = total
        return logits

    def _chosen(self, before: int, rows: int) -> Executor:
        for one in self.layout.classes:
            if one.name in self.compiled and one.covers(before, rows):
                return self.compiled[one.name]
        return self.eager["step" if before else "first"]

    def probe(self, chosen: Executor, state: DecoderState, ids: Tensor, before: int) -> Tensor:
        """Run one step of an executor as if `before` tokens had come before; the state is of no use afterwards."""
        total = before + ids.shape[1]
        self._write(state, ids, None, before, total)
        shared = self._shared(state, before, total)
        return _execute(chosen, shared, _named_states(self.layout, state), state, False)

    def rollback(self, state: DecoderState, columns: int) -> None:
        """Take back the last `columns` tokens of every row; recurrent states are recomputed from the nearest checkpoint."""
        with torch.inference_mode():
            tokens = dict(state.tokens.items())
            target = cut_back(self.layout, state, columns)
            if state.length < target:
                names = list(self.layout.inputs)
                ids = tokens[names[0]][:, state.length : target]
                mask = tokens[names[1]][:, state.length : target] if len(names) > 1 else None
                self.run(state, ids, mask)

    def _write(self, state: DecoderState, ids: Tensor, mask: Tensor | None, before: int, total: int) -> None:
        names = self.layout.inputs
        state.tokens[names[0]][:, before:total] = ids
        if mask is not None and len(names) == 1 and not bool((mask != 0).all()):
            raise GenerationError(
                "the model takes no attention mask, so padded rows cannot be decoded; give rows of one length."
            )
        for name in names[1:]:
            state.tokens[name][:, before:total] = 1 if mask is None else mask

    def _shared(self, state: DecoderState, before: int, total: int) -> dict[str, Tensor]:
        shared = {name: state.tokens[name][:, before:total] for name in self.layout.inputs}
        shared["columns"], shared["slots"] = state.arange[before:total], state.arange[:total]
        if self.layout.history is not None:
            values = self.layout.history(*(state.tokens[name][:, :total] for name in self.layout.inputs))
            for n in range(self.layout.tables):
                shared[f"table_{n}"] = values[n].contiguous()
            for n, axis in enumerate(self.layout.past_axes):
                shared[f"past_{n}"] = values[self.layout.tables + n].narrow(axis, before, total - before).contiguous()
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


def _named_states(layout: DecoderLayout, state: DecoderState) -> dict[str, Tensor]:
    """The state tensors by placeholder name."""
    segment, named, kv, recurrent = state.segments[-1], {}, 0, 0
    for n, site in enumerate(layout.sites):
        if site.kind == "kv":
            named[f"k_{n}"], named[f"v_{n}"] = segment.k[kv], segment.v[kv]
            kv += 1
        else:
            named.update((f"{name}_{n}", t) for name, t in zip(RECURRENT, state.recurrent[recurrent], strict=True))
            recurrent += 1
    return named
