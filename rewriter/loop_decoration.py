"""`@subquad.rewrite` on a function or method that holds a decoding loop: the same calls, the same tokens, fewer operations."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from subquad.cached_run import CachedRun
from subquad.ir.errors import SubquadError
from subquad.ir.loop import Loop, Schedule
from subquad.ir.loop_rewrite import LoopRewrite
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report
from subquad.loop_recording import recorded_loop, recording
from subquad.loop_run import LoopModel, LoopRun, active, bound
from subquad.passes.recognize.loop_function import UNSEEN, Reading, read_loop
from subquad.step_model import held

CACHE, LAST, CHUNKS = "derived cache", "last row only", "prefill in chunks"


class DecodingFunction:
    """What is known of one decorated function: its reading by model, and the report that its users see."""

    def __init__(self, function: Callable[..., Any], speculation: LoopRewrite | None) -> None:
        self.speculation = speculation
        self.function, self.signature = function, inspect.signature(function)
        self.report = Report()
        self.watched: weakref.ref[nn.Module] | None = None
        self.unreadable = False

    def reading(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading | Refusal:
        """The loop as it stands in the source, with the model that these arguments name."""
        try:
            given = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            return Refusal(self.function.__qualname__, "loop: arguments", f"{error}.")
        given.apply_defaults()
        return read_loop(self.function, given.arguments)

    def model_of(self, reading: Reading) -> LoopModel:
        """The model's record, shared by all calls of the function with it."""
        loops = held(reading.root).loops
        if self not in loops:
            loops[self] = LoopModel(reading.root, reading.uses, reading.kept, speculation=self.speculation)
        model = loops[self]
        assert isinstance(model, LoopModel)
        return model

    def tell(self, loop: Loop | None, model: LoopModel | None, refusal: Refusal | None) -> None:
        """Bring the report up to date after a call."""
        self.report.refusals = [] if refusal is None else [refusal]
        self.report.loops, self.report.applied = [], []
        if loop is not None:
            told(self.report, loop, model)


def told(report: Report, loop: Loop, model: LoopModel | None) -> None:
    """Write into a report what is known of a loop after a run of it."""
    report.loops, report.applied = [replace(loop, schedules=schedules(loop, model))], []
    if model is None:
        return
    report.notes = list(model.notes)
    if model.refused is not None:
        guard, sentence = model.refused
        report.refusals = [
            Refusal(loop.path, f"loop: guard {guard}", sentence, loop.model.source, loop.model.detail, "loop")
        ]
    elif model.step is None and model.original == 0:
        sentence = "the model was not called in the thread in which the loop runs, so that no call could be answered."
        report.refusals = [Refusal(loop.path, "loop: model", sentence, loop.model.source, loop.model.detail, "loop")]
    elif model.step is not None and (model.answered > 0 or not passes_cache(loop)):
        names = ", ".join(s.name for s in report.loops[0].schedules if s.applies)
        report.applied = [{"path": loop.path, "pass": names, "contract": "lossless", "mask": ""}]
        report.notes.append(
            f"{model.answered} calls of the model were answered by the decoder, {model.original} by itself"
        )
        report.notes += model.passed


def schedules(loop: Loop, model: LoopModel | None) -> tuple[Schedule, ...]:
    """Which exact schedules the loop takes, and why the others do not apply."""
    fed, passes_on = loop.context.kind, passes_cache(loop)
    if fed != "full prefix" and not passes_on:
        part = "the last token alone" if fed == "last token" else "slices of its tokens"
        why = (
            f"the loop feeds {part}: what its model knows of earlier ones is in a cache of its own, which stays in use"
        )
        return (Schedule(CACHE, False, why),)
    if model is not None and model.refused is not None:
        return (Schedule(CACHE, False, f"the guard {model.refused[0]} failed: {model.refused[1]}"),)
    if model is not None and model.step is None:
        return (Schedule(CACHE, False, "the model was not called yet"),)
    kept = "the loop feeds the whole prefix each time; keys and values of earlier tokens are kept"
    if passes_on and model is not None and model.answered == 0:
        why = "the loop keeps a cache itself; calls are answered once the decoder is compiled, which a small model's is not"
        return (Schedule(CACHE, False, why),)
    if passes_on:
        kept = f"the tokens in `{loop.cache.detail}` are known; what it holds is computed when the loop reads it"
    return (
        Schedule(CACHE, True, kept),
        Schedule(LAST, True, "rows of the logits are computed when they are read"),
        Schedule(CHUNKS, True, "a long prompt is run in parts, which bounds its memory"),
        _drafts(model),
        Schedule(
            "deferred stop check", False, "stops run as they stand; on the CPU a check does not wait for a device"
        ),
    )


def passes_cache(loop: Loop) -> bool:
    """True when the loop passes a cache to its model, so that calls can be answered from the tokens in it."""
    return loop.cache.kind in ("passed on", "object")


def _run(loop: Loop, model: LoopModel) -> LoopRun:
    return CachedRun(model) if passes_cache(loop) else LoopRun(model)


def _left_whole(loop: Loop) -> bool:
    return loop.context.kind != "full prefix" and not passes_cache(loop)


def _drafts(model: LoopModel | None) -> Schedule:
    if model is None or model.speculation is None:
        return Schedule("draft and verify", False, "not asked for: @subquad.rewrite(passes='speculate')")
    return Schedule("draft and verify", True, f"rows behind drafts of {model.speculation} are computed ahead")


def decorate_function(function: Callable[..., Any], speculation: LoopRewrite | None = None) -> Callable[..., Any]:
    """A function with the same signature that runs the same loop with its model's calls answered by a derived decoder.

    The loop is read from its source at each call (from a recorded run where there is no source); what is not understood,
    and what fails a guard, runs as it stands, and `report` on the returned function says why.  speculation: rows of drafted
    tokens are computed ahead, for batches of one; the loop still chooses every token from its row, in order.
    Raises SubquadError for a coroutine.
    """
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise SubquadError(
            f"@subquad.rewrite cannot decorate the coroutine {function.__qualname__}; decorate what it awaits."
        )
    known = DecodingFunction(function, speculation)

    if inspect.isgeneratorfunction(inspect.unwrap(function)):

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return _generated(known, args, kwargs)

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            reading = known.reading(args, kwargs)
            if isinstance(reading, Refusal):
                if reading.kind == UNSEEN:
                    return _watched(known, reading, args, kwargs)
                known.tell(None, None, reading)
                return function(*args, **kwargs)
            if _left_whole(reading.loop):
                known.tell(reading.loop, None, _left(reading.loop))
                return function(*args, **kwargs)
            model = known.model_of(reading)
            try:
                with bound(reading.root), active(_run(reading.loop, model)):
                    return function(*args, **kwargs)
            finally:
                known.tell(reading.loop, model, None)

    wrapper.report = known.report  # type: ignore[attr-defined]
    return wrapper


def _generated(known: DecodingFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """A generator's loop: its model's calls are answered while the generator itself runs, not while its consumer does."""
    reading = known.reading(args, kwargs)
    if isinstance(reading, Refusal) or _left_whole(reading.loop):
        known.tell(
            None if isinstance(reading, Refusal) else reading.loop,
            None,
            reading if isinstance(reading, Refusal) else _left(reading.loop),
        )
        return (yield from known.function(*args, **kwargs))
    model = known.model_of(reading)
    run, inner = _run(reading.loop, model), known.function(*args, **kwargs)
    sent: Any = None
    try:
        while True:
            with bound(reading.root), active(run):
                try:
                    item = inner.send(sent)
                except StopIteration as end:
                    return end.value
            sent = yield item
    finally:
        inner.close()
        known.tell(reading.loop, model, None)


def _left(loop: Loop) -> Refusal:
    """The reason why a loop that was understood stays as it is."""
    (only,) = schedules(loop, None)
    return Refusal(loop.path, "loop: context", only.reason + ".", loop.context.source, loop.context.detail, "loop")


def _watched(known: DecodingFunction, refusal: Refusal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function whose source says nothing and watch it; later calls with the same model are answered if it is a loop."""
    root = None if known.watched is None else known.watched()
    if root is not None:
        loop, model = known.report.loops[0], held(root).loops[known]
        try:
            with bound(model.root), active(LoopRun(model)):
                return known.function(*args, **kwargs)
        finally:
            known.tell(loop, model, None)
    if known.unreadable:
        return known.function(*args, **kwargs)
    with recording() as seen:
        out = known.function(*args, **kwargs)
    found = recorded_loop(known.function, seen)
    if isinstance(found, Refusal):
        known.unreadable = True
        known.tell(None, None, refusal if seen.calls == [] else found)
    else:
        known.watched = weakref.ref(found.root)
        known.model_of(found)
        known.tell(found.loop, None, None)
    return out
