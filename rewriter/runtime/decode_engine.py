"""Run a decoder's programs over a state: prompts, steps, drafts that are verified and committed, rollback."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.layout import DecoderLayout
from subquad.runtime.pass_inputs import Beside, StepInputs, Tokens, lag, next_tokens, prompt_inputs
from subquad.runtime.readout import Readout, find_readout
from subquad.runtime.schedule import Runner, Schedule
from subquad.runtime.state import DecoderState, Pending, Recurrence, commit, cut_back, new_state, remember, reserve

TAIL = -1
"""The key of the stream behind the last attention."""


class SharedInputs(Protocol):
    """Values by placeholder name."""

    def __getitem__(self, name: str) -> Tensor:
        """The value of one placeholder."""


@dataclass(frozen=True)
class Executor:
    """A schedule with a runner and the weight tensors of each of its programs; immutable once made.

    reads: names of the shared inputs that the entry takes.
    """

    schedule: Schedule
    reads: tuple[str, ...]
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
    reads = tuple(str(n.target) for n in entry.graph.find_nodes(op="placeholder"))[: entry.counts[0]]
    return Executor(schedule, reads, found[entry.key], tuple(weights[name] for name in entry.weights), calls)


class DecodeEngine:
    """Runs a decoder.  It holds no state of any call, so threads may share it.

    eager: executors without compiled programs, "step" for any width after, and "first" for any width at, the start.
    compiled: executors by the name of their width class; adding one switches over at the next call.
    """

    def __init__(self, layout: DecoderLayout, eager: Mapping[str, Executor], device: torch.device) -> None:
        self.layout, self.eager, self.device = layout, eager, device
        self.compiled: dict[str, Executor] = {}

    def start(self, batch: int, capacity: int, fixed: tuple[Tensor, ...] = ()) -> DecoderState:
        """An empty state; fixed: the values of the layout's `Fixed`, if it has one."""
        return new_state(self.layout, batch, capacity, self.device, fixed=fixed)

    def run(
        self, state: DecoderState, ids: Tensor, mask: Tensor | None = None, last_only: bool = True,
        streams: dict[int, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Append tokens ids [B, w] (mask [B, w], 1 for real tokens) and return logits [B, 1 or w, vocabulary].

        streams: receives the stream [B, w, ...] behind the last attention under TAIL, and in front of blocks whose numbers are
        its keys.  Raises GenerationError when the ids do not fit the state or the model's position table.
        """
        with torch.inference_mode():
            self._admit(state, ids, mask)
            if state.length == 0:
                return self._prompt(state, ids, last_only, streams)
            logits = self._step(state, ids, None, last_only, (), streams)
            commit(state, [range(ids.shape[1])] * state.batch)
            return logits

    def verify(
        self, state: DecoderState, ids: Tensor, parents: Tensor | None = None, skip: Collection[int] = (),
        watched: dict[int, Tensor] | None = None, beside: Beside | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Logits [B, w, vocabulary] and stream [B, w, ...] behind the last attention, of nodes ids [B, w]; all are pending.

        parents: int64 [w] or [B, w], the node before each node (smaller than its own number) or -1 where it follows what is
        committed; None for chains.  skip: numbers of the blocks (see `blocks`) that are left out.  watched: its keys are
        numbers of blocks; receives the stream in front of each.  beside: makes probes of some of the nodes.
        Raises GenerationError for trees in a model that can run chains only, and as `run` does.
        """
        with torch.inference_mode():
            if parents is not None and not self.layout.trees:
                raise GenerationError("the model has recurrent states, so that only chains of tokens can be verified.")
            self._admit(state, ids, None)
            streams: dict[int, Tensor] = {} if watched is None else watched
            logits = self._step(state, ids, parents, False, skip, streams, beside)
            return logits, streams.pop(TAIL)

    def commit(self, state: DecoderState, paths: Sequence[Sequence[int]]) -> None:
        """Keep of the pending nodes those of each row's path, the root first; see `runtime.state.commit`."""
        with torch.inference_mode():
            commit(state, paths)

    def rollback(self, state: DecoderState, columns: int | Sequence[int]) -> None:
        """Take back the last `columns` tokens of every row, or of each; recurrent states catch up in the next pass."""
        with torch.inference_mode():
            cut_back(self.layout, state, [columns] * state.batch if isinstance(columns, int) else columns)

    @property
    def shares(self) -> bool:
        """Whether rows of a state may share keys and values."""
        return "branch" in self.eager

    def branch(
        self, state: DecoderState, ids: Tensor, widths: Sequence[int], wanted: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """Append the first widths[b] of ids [B, w] to each row b, and return the logits [B, vocabulary] behind its last one.

        wanted: for each row (first, last) of its tokens in ids behind which logits are wanted, instead; they come one row
        after the other.  The rows have no columns of their own yet, what they share aside.  No row has padding; what stands
        behind a row's tokens is of no account, and neither are the logits of a row that gets none.  Raises GenerationError
        as `run` does.
        """
        with torch.inference_mode():
            total = max(length + width for length, width in zip(state.lengths, widths, strict=True))
            self._admit(state, ids, None, total)
            batch, width = ids.shape
            nodes, given = state.arange[:width], torch.tensor(widths, device=state.device)
            columns = (torch.tensor(state.lengths, device=state.device)[:, None] + nodes).clamp_max(total - 1)
            real = None if min(widths) == width else nodes < given[:, None]
            inputs = StepInputs(
                self.layout, state, Tokens(ids, columns, nodes.expand(batch, width), None, real, total, width)
            )
            ends = torch.arange(batch, device=state.device) * width + (given - 1).clamp_min(0)
            if wanted is not None:
                places = [
                    row * width + place for row, (first, last) in enumerate(wanted) for place in range(first, last + 1)
                ]
                ends = torch.tensor(places, device=state.device)
            logits = _execute(self.eager["branch"], inputs, self.layout, state, ids.shape, True, ends=ends)
            state.lengths = [length + more for length, more in zip(state.lengths, widths, strict=True)]
            state.recurrence = state.recurrence._replace(columns=tuple(state.lengths))
            return logits[:, -1]

    @property
    def blocks(self) -> int:
        """Parts of the network, one after another on the residual stream, that `verify` can leave out."""
        return self.eager["step"].schedule.tail

    @functools.cached_property
    def readout(self) -> Readout | None:
        """The head of logits, None when the network does not end in one product with a weight."""
        step = self.eager["step"]
        return find_readout(step.schedule, step.calls)

    def probe(self, chosen: Executor, state: DecoderState, ids: Tensor, before: int) -> Tensor:
        """Run one pass of an executor as if `before` tokens had come before; the state is of no use afterwards."""
        if before == 0:
            return _execute(chosen, prompt_inputs(self.layout, state, ids), self.layout, state, ids.shape, False)
        state.lengths = [before] * state.batch
        state.recurrence = state.recurrence._replace(columns=tuple(state.lengths))
        inputs = StepInputs(self.layout, state, next_tokens(state, ids, None))
        return _execute(chosen, inputs, self.layout, state, ids.shape, False)

    def _admit(self, state: DecoderState, ids: Tensor, mask: Tensor | None, total: int | None = None) -> None:
        """Make room for tokens, and write them where they stay when all are kept.  Raises GenerationError.

        total: columns of the longest row behind them, when not every row gets all.
        """
        batch, width = ids.shape
        total, names = state.length + width if total is None else total, self.layout.inputs
        if batch != state.batch or width == 0:
            raise GenerationError(f"a step of shape {list(ids.shape)} does not fit a state of {state.batch} rows.")
        if self.layout.limit is not None and total > self.layout.limit:
            raise GenerationError(
                f"{total} tokens were asked of a model whose position table has {self.layout.limit} rows."
            )
        if mask is not None and len(names) == 1 and not bool((mask != 0).all()):
            raise GenerationError(
                "the model takes no attention mask, so padded rows cannot be decoded; give rows of one length."
            )
        cut_back(self.layout, state, [0] * batch)
        reserve(state, 2 * width + lag(state))
        for name, value in zip(names, (ids, 1 if mask is None else mask), strict=False):
            if len(set(state.lengths)) == 1:
                state.tokens[name][:, state.lengths[0] : state.lengths[0] + width] = value
            else:
                starts = torch.tensor(state.lengths, device=state.device)[:, None]
                values = torch.as_tensor(value, device=state.device).expand(batch, width)
                state.tokens[name].scatter_(1, starts + state.arange[:width], values)

    def _prompt(
        self, state: DecoderState, ids: Tensor, last_only: bool, streams: dict[int, Tensor] | None = None
    ) -> Tensor:
        remember(state)
        chosen = self._compiled(0, ids.numel()) or self.eager["first"]
        shared = prompt_inputs(self.layout, state, ids)
        logits = _execute(chosen, shared, self.layout, state, ids.shape, last_only, (), streams)
        state.lengths = [ids.shape[1]] * state.batch
        return logits

    def _step(
        self, state: DecoderState, ids: Tensor, parents: Tensor | None, last_only: bool, skip: Collection[int] = (),
        streams: dict[int, Tensor] | None = None, beside: Beside | None = None,
    ) -> Tensor:  # fmt: skip
        tokens = next_tokens(state, ids, parents, beside)
        batch, width = ids.shape
        remember(state)
        known = None if parents is None else parents.expand(batch, width).tolist()
        state.pending = Pending(ids, known, state.recurrence)
        chosen = self.stepping(state, tokens.ids.numel())
        inputs = StepInputs(self.layout, state, tokens)
        added = None if beside is None else F.pad(beside.added, (0, 0, tokens.ids.shape[1] - width, 0))
        logits = _execute(chosen, inputs, self.layout, state, tokens.ids.shape, last_only, skip, streams, None, added)
        if streams is not None:
            streams.update({n: stream[:, -width:] for n, stream in streams.items()})
        return logits[:, -width:]

    def stepping(self, state: DecoderState, rows: int) -> Executor:
        """What runs `rows` tokens in all behind those of a state."""
        found = self._compiled(1, rows)
        if state.shared is None:
            return found or self.eager["step"]
        return found if found is not None and self.joins(found) else self.eager["joined"]

    def joins(self, chosen: Executor) -> bool:
        """Whether an executor of steps reads keys and values that rows share."""
        reads = {*chosen.reads, *chosen.schedule.raw}
        return "nodes" in reads or all(site.kind != "kv" for site in self.layout.sites)

    def _compiled(self, before: int, rows: int) -> Executor | None:
        for one in self.layout.classes:
            if one.name in self.compiled and one.covers(before, rows):
                return self.compiled[one.name]
        return None


def _execute(
    chosen: Executor, shared: SharedInputs, layout: DecoderLayout, state: DecoderState, shape: tuple[int, ...],
    last_only: bool, skip: Collection[int] = (), streams: dict[int, Tensor] | None = None, ends: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Logits [B, w or 1, V] of a pass of this shape [B, w]; the recurrent states become those after it.

    streams: receives the stream [B, w, ...] in front of each block that is a key of it, and behind the last attention.
    ends: int64 [n], the places among all tokens of the pass of those whose logits [n, 1, V] are wanted, where they are not the
    last column's.  added: [B, w, e], what is added to the stream in front of the first block.
    """
    schedule, tensors = chosen.schedule, named_states(layout, state)
    stream, sides = entered(chosen, shared)
    stream = stream if added is None else stream + added.reshape(stream.shape)
    kept = shape
    for n, (runner, used, weights, names, returned) in enumerate(chosen.calls):
        if streams is not None and n in streams:
            streams[n] = _by_row(stream, shape)
        if n == schedule.tail:
            if streams is not None:
                streams[TAIL] = _by_row(stream, shape)
            if last_only:
                stream, kept = _last(stream, shape, ends), (shape[0] if ends is None else len(ends), 1)
        if n in skip and n < schedule.tail:
            continue
        outputs = runner([stream, *(sides[i] for i in used), *weights, *(tensors[name] for name in names)])
        stream = outputs[0]
        if returned:
            recurrent = [name for name in names if name.rpartition("_")[0] in RECURRENT]
            tensors.update(zip(_in_order(recurrent), outputs[1:], strict=True))
    _take_recurrent(layout, state, tensors, shape[1])
    if streams is not None and TAIL not in streams:
        streams[TAIL] = _by_row(stream, shape)
    if last_only and kept == shape and ends is not None:
        stream, kept = _last(stream, shape, ends), (len(ends), 1)
    stream = _by_row(stream, kept)
    return stream[:, -1:] if last_only else stream


def entered(chosen: Executor, shared: SharedInputs) -> tuple[Tensor, list[Tensor]]:
    """The stream in front of the first block, and the side values."""
    stream, *sides = chosen.entry([*(shared[name] for name in chosen.reads), *chosen.entry_weights])
    return stream, [*sides, *(shared[name] for name in chosen.schedule.raw)]


def _last(stream: Tensor, shape: tuple[int, ...], ends: Tensor | None) -> Tensor:
    """The last token of each row of a stream [B, w, ...] or [1, B * w, ...]."""
    return stream[:, shape[1] - 1 :: shape[1]] if ends is None else stream.index_select(1, ends)


def _by_row(stream: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A stream [B, w, ...] or [1, B * w, ...] as the first of them."""
    return stream if stream.shape[:2] == shape else stream[0].unflatten(0, shape)


def _take_recurrent(layout: DecoderLayout, state: DecoderState, tensors: Mapping[str, Tensor], width: int) -> None:
    if state.recurrence.sites:
        columns = tuple(length + width - lag(state) for length in state.lengths)
        sites = (n for n, site in zip(layout.state_names, layout.sites, strict=True) if site.kind == "recurrent")
        state.recurrence = Recurrence(columns, tuple(tuple(tensors[name] for name in names) for names in sites))


RECURRENT = ("state", "window_k", "window_v", "seen")


def _in_order(names: Sequence[str]) -> list[str]:
    """State names in the order in which a program returns them: by site, then state, window_k, window_v, seen."""
    return sorted(names, key=lambda name: (int(name.rpartition("_")[2]), RECURRENT.index(name.rpartition("_")[0])))


class _States(dict[str, Tensor]):
    """State tensors by placeholder name; shared keys and values have no slots where nothing is shared."""

    def __missing__(self, name: str) -> Tensor:
        return self[name.removeprefix("shared_")][0, :0]


def named_states(layout: DecoderLayout, state: DecoderState) -> dict[str, Tensor]:
    """The state tensors by placeholder name; those of the first sites where the layout has no others."""
    named, recurrent = _States(), iter(state.recurrence.sites)
    keys = zip(state.k, state.v, strict=True)
    for names, site in zip(layout.state_names, layout.sites, strict=True):
        named.update(zip(names, next(keys) if site.kind == "kv" else next(recurrent), strict=True))
    if state.shared is not None:
        kv = (names for names, site in zip(layout.state_names, layout.sites, strict=True) if site.kind == "kv")
        for names, *tensors in zip(kv, state.shared.k, state.shared.v, strict=False):
            named.update((f"shared_{name}", tensor) for name, tensor in zip(names, tensors, strict=True))
    return named
