"""The model that decodes a sequence as its drafter sees it: without some of its blocks, or its first blocks alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.decode_engine import DecodeEngine, Executor, entered, named_states
from subquad.runtime.layout import DecoderLayout
from subquad.runtime.pass_inputs import StepInputs, Tokens
from subquad.runtime.state import DecoderState, Recurrence, SharedKeys, chosen_rows, new_state, reserve

if TYPE_CHECKING:
    from subquad.runtime.tree_stepper import TreeStepper

PIECE = 256
"""Tokens of a prompt that run at once."""


class RowModel:
    """One row of a stepper; see ir.decoding.OwnModel."""

    def __init__(self, stepper: TreeStepper, row: int) -> None:
        self.stepper, self.row = stepper, row
        self._shared: tuple[SharedKeys, SharedKeys] | None = None

    @property
    def blocks(self) -> int:
        """How many blocks the network has."""
        return self.stepper.blocks

    def skipping(self, tokens: Sequence[int], skip: Collection[int]) -> Tensor:
        """Logits [n, V] of a chain behind the row without some blocks."""
        return self.stepper.skipping(self.row, tokens, skip)

    def watch(self, block: int) -> None:
        """From the next pass on `stream` can be asked about this block."""
        self.stepper.watched.add(block)

    def stream(self, block: int, nodes: Sequence[int]) -> Tensor:
        """The stream [n, ...] in front of a block behind nodes of the last pass."""
        return self.stepper.stream(block, self.row, nodes)

    def ahead(self, tokens: Sequence[int], place: int, blocks: int) -> Tensor:
        """The stream [n, ...] behind the first `blocks` blocks of tokens of a chain, the first one `place` tokens below the
        pending one; their keys lie where the next pass writes its own.
        """
        stepper, n = self.stepper, len(tokens)
        state, at = stepper.state, stepper.place(self.row)
        assert state is not None
        with torch.inference_mode():
            reserve(state, place + n)
            layout = first_sites(stepper.engine, blocks)
            one = self._view(state, at, len(layout.sites))
            return run_blocks(
                stepper.engine.stepping(one, n), layout, one, tokens, state.lengths[at] + place, range(blocks)
            )

    def copy(self, blocks: int, weights: Mapping[str, Tensor] | None = None) -> FirstBlocks:
        """The first blocks with a state of their own, which holds nothing, and other weights by name where given."""
        return FirstBlocks(self.stepper.engine, blocks, weights or {})

    def _view(self, state: DecoderState, row: int, sites: int) -> DecoderState:
        """One row of a state, in the same memory."""
        rows, shared = slice(row, row + 1), None
        if state.shared is not None:
            if self._shared is None or self._shared[0] is not state.shared:
                self._shared = (state.shared, chosen_rows(state.shared, [row]))
            shared = self._shared[1]
        return DecoderState(
            state.device, [state.lengths[row]], {name: t[rows] for name, t in state.tokens.items()}, [],
            [t[rows] for t in state.k[:sites]], [t[rows] for t in state.v[:sites]], Recurrence((0,), ()), state.arange, shared,
            fixed=tuple(t[rows] if t.shape[0] > 1 else t for t in state.fixed),
        )  # fmt: skip


class FirstBlocks:
    """The first blocks of a decoder over one sequence; see ir.decoding.Blocks.  Columns count from the sequence's start."""

    def __init__(self, engine: DecodeEngine, blocks: int, weights: Mapping[str, Tensor]) -> None:
        own = engine.eager["step"]
        dtypes = {
            name: weight.dtype
            for call, (_, _, given, _, _) in zip(own.schedule.calls[:blocks], own.calls[:blocks], strict=True)
            for name, weight in zip(call.weights, given, strict=True)
        }
        self.engine, self.blocks = engine, blocks
        self.weights = {name: t.to(engine.device, dtypes.get(name, t.dtype)) for name, t in weights.items()}
        self.layout = first_sites(engine, blocks)
        self.state = new_state(self.layout, 1, 0, engine.device)
        self._bound: dict[int, tuple[Executor, Executor]] = {}

    def run(self, tokens: Sequence[int], column: int, blocks: range, stream: Tensor | None = None) -> Tensor:
        """The stream [n, ...] behind the last of `blocks`; stream: what lies in front of the first one, None for block 0."""
        found = []
        with torch.inference_mode():
            self.state.lengths = [column]
            reserve(self.state, len(tokens))
            for start in range(0, len(tokens), PIECE):
                piece = tokens[start : start + PIECE]
                chosen = self._executor(self.engine.stepping(self.state, len(piece)))
                given = None if stream is None else stream[start : start + PIECE]
                found.append(run_blocks(chosen, self.layout, self.state, piece, column + start, blocks, given))
            return torch.cat(found) if len(found) > 1 else found[0]

    def _executor(self, chosen: Executor) -> Executor:
        """An executor with these weights in the place of the model's."""
        if not self.weights:
            return chosen
        if self._bound.get(id(chosen), (None,))[0] is not chosen:
            self._bound[id(chosen)] = (chosen, rebound(chosen, self.blocks, self.weights))
        return self._bound[id(chosen)][1]


def rebound(chosen: Executor, blocks: int, weights: Mapping[str, Tensor]) -> Executor:
    """The first blocks of an executor with other weights by name."""
    calls = tuple(
        (
            runner,
            sides,
            tuple(_fitting(weights, name, w) for name, w in zip(call.weights, own, strict=True)),
            states,
            fresh,
        )
        for call, (runner, sides, own, states, fresh) in zip(
            chosen.schedule.calls[:blocks], chosen.calls[:blocks], strict=True
        )
    )
    return replace(chosen, calls=calls)


def _fitting(weights: Mapping[str, Tensor], name: str, own: Tensor) -> Tensor:
    """The weight in the place of the model's own, which stays where it is no number that can be learnt."""
    if not own.is_floating_point():
        return own
    if name not in weights:
        raise GenerationError(
            f"what was trained in the place of the model's blocks lacks the weight {name}; train it again."
        )
    if weights[name].shape != own.shape:
        raise GenerationError(
            f"what was trained in the place of the model's {name} is of shape {list(weights[name].shape)}, not "
            f"{list(own.shape)}; train it again."
        )
    return weights[name]


def first_sites(engine: DecodeEngine, blocks: int) -> DecoderLayout:
    """The layout of a decoder's first blocks."""
    calls = engine.eager["step"].schedule.calls[:blocks]
    sites = {int(name.rpartition("_")[2]) for call in calls for name in call.states}
    return replace(engine.layout, sites=engine.layout.sites[: max(sites, default=-1) + 1])


def run_blocks(
    chosen: Executor, layout: DecoderLayout, state: DecoderState, tokens: Sequence[int], column: int, blocks: range,
    stream: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The stream [n, ...] behind `blocks` of tokens of one row from a column on; their keys and values are written there.

    stream: what lies in front of the first of the blocks; None for block 0.
    """
    n = len(tokens)
    ids = torch.tensor([list(tokens)], device=state.device)
    for number, name in enumerate(layout.inputs):
        state.tokens[name][:, column : column + n] = ids if number == 0 else 1
    columns = (column + state.arange[:n])[None]
    own = column + n - state.base[0]
    shared = StepInputs(layout, state, Tokens(ids, columns, columns - state.base[0], None, None, column + n, own))
    first, sides = entered(chosen, shared)
    passed = first if stream is None else stream[None]
    tensors = named_states(layout, state)
    for runner, used, weights, names, _ in chosen.calls[blocks.start : blocks.stop]:
        passed = runner([passed, *(sides[i] for i in used), *weights, *(tensors[name] for name in names)])[0]
    return passed[0]
