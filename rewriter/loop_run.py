"""Run a user's loop with its model's calls answered from a decoder: guards first, then row by row."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from subquad.call_positions import counted
from subquad.ir.errors import CaptureError, SubquadError, first_line
from subquad.ir.loop import Slot
from subquad.ir.loop_rewrite import LoopRewrite
from subquad.loop_guards import Broken, checked, deterministic, readable
from subquad.runtime.lazy_logits import LazyLogits
from subquad.runtime.lookahead import Lookahead
from subquad.runtime.pacing import MeasuredPacing, Pacing
from subquad.runtime.prefix_call import PrefixCall
from subquad.step_model import Given, StepModel, step_model

COMPARED = 3
"""Calls of a loop that are answered by the model itself while the decoder's rows are compared with its."""
SHIFTED = "their positions count from the first real token, and the model reads more of them than their order"
REBUILT = 2
"""How often a model whose parameters changed between calls is captured again."""


@dataclass
class LoopModel:
    """What is known of the model of one loop.

    uses, kept: how the loop reads the call's result, and where values of the logits leave it (see `Reading`).
    step: the decoder behind the calls, None before the first call.  refused: (guard, sentence) that keeps the original
    loop.  passed: the guards that held, in words.  answered, original: calls by who answered them.
    shifts: whether the model gives the same wherever the places of a row begin, None before that was tried.
    speculation: how drafts are made, None for none; pacing: how many of them are run.  keeping: what is known of the cache
    that the loop passes along (see `cached_run.Keeping`), None before its first call and for loops without.
    """

    root: nn.Module
    uses: frozenset[str]
    kept: Slot | None
    step: StepModel | None = None
    refused: tuple[str, str] | None = None
    passed: list[str] = field(default_factory=list)
    compared: int = 0
    built: int = 0
    answered: int = 0
    original: int = 0
    notes: list[str] = field(default_factory=list)
    speculation: LoopRewrite | None = None
    shifts: bool | None = None
    pacing: Pacing | None = None
    keeping: Any = None

    def lookahead(self) -> Lookahead | None:
        """Drafts for one run of the loop, where they were asked for; what the drafter learns stays for later runs."""
        if self.speculation is None or self.step is None:
            return None
        if self.pacing is None:
            self.pacing = MeasuredPacing(1 + self.speculation.num_speculative_tokens)
        return Lookahead(self.step.decoder.drafter(self.speculation), self.pacing)

    def note(self, sentence: str) -> None:
        """Keep a sentence for the report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


class LoopRun:
    """One execution of a user's loop."""

    def __init__(self, model: LoopModel) -> None:
        self.model = model
        self.prefix: PrefixCall | None = None

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one call of the model."""
        model = self.model
        why = self._why_original(kwargs)
        if model.refused is None and why is None and model.step is None:
            return self._first(original, args, kwargs)
        given: Given | None = None
        places = counted(model.root, kwargs)
        if model.refused is None and why is None and model.step is not None:
            given, why = model.step.bound(args, places.left_out(kwargs))
            if places.shifted and model.shifts is False:
                given, why = None, SHIFTED
        if given is None or model.step is None:
            if why is not None:
                model.note(f"some calls ran the model itself: {why}")
            model.original += 1
            return original(*args, **kwargs)
        self.ready()
        assert self.prefix is not None
        if places.shifted and model.shifts is None:
            return self._shifted(original, args, kwargs, given)
        if model.compared < COMPARED:
            return self._compared(original, args, kwargs, given)
        self.count()
        return model.step.returned(_logits(self.prefix, model.step, given.copied(), lambda: original(*args, **kwargs)))

    def ready(self) -> None:
        """Have a decoder state for the model as it is now."""
        step = self.model.step
        assert step is not None
        if self.prefix is None or self.prefix.engine is not step.decoder.engine:
            self.prefix = PrefixCall(step.decoder.engine, self.model.lookahead())

    def count(self) -> None:
        """Note that a call is answered by the decoder, which is compiled beside the first."""
        assert self.model.step is not None
        if self.model.answered == 0:
            self.model.step.compile()
        self.model.answered += 1

    def _why_original(self, kwargs: dict[str, Any]) -> str | None:
        """Why this call cannot be answered; forgets a decoder whose model changed."""
        model = self.model
        if torch.is_grad_enabled() and model.kept is not None and any(p.requires_grad for p in model.root.parameters()):
            return (
                f"gradients may flow through `{model.kept.detail}` ({model.kept.source}); decode under torch.no_grad()"
            )
        if model.step is not None and (why := model.step.changed()) is not None:
            model.step, self.prefix, model.compared = None, None, 0
            if model.built > REBUILT:
                model.refused = "determinism", f"{why}, again and again"
            return why
        return None

    def _first(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first call: the model answers, and is captured, derived and tested beside it."""
        model = self.model
        model.original += 1
        model.built += 1
        kept = _copies(args), {key: _copies(value) for key, value in kwargs.items()}
        out = original(*args, **kwargs)
        with refuse_by(model):
            odd = [type(v).__name__ for v in pytree.tree_leaves((args, kwargs)) if _may_change(v)]
            if odd:
                raise Broken("arguments", f"a call is given a {odd[0]}, which the model may change.")
            held = deterministic(model.root, original, *kept, out)
            places = counted(model.root, kept[1])
            plain = kept[0], places.left_out(kept[1])
            model.step = step_model(model.root, *plain, out)
            readable(model.step, model.uses)
            model.passed = [held, *checked(model.step, original, *plain, out)]
            model.shifts = True if places.shifted else model.shifts
        return out

    def _shifted(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Given
    ) -> Any:
        """The first call whose positions count from the first real token: the model answers, and tells if that matters."""
        model, given = self.model, given.copied()
        assert model.step is not None
        model.original += 1
        out = original(*args, **kwargs)
        try:
            model.shifts = self._compare(model.step, out, given) or None
        except Broken:
            model.shifts = False
            model.note(f"some calls ran the model itself: {SHIFTED}")
        return out

    def _compared(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Given
    ) -> Any:
        """A call that the model answers while the decoder's row is compared with its."""
        model, step = self.model, self.model.step
        assert step is not None
        assert self.prefix is not None
        model.original += 1
        given = given.copied()
        out = original(*args, **kwargs)
        with refuse_by(model):
            if self._compare(step, out, given):
                model.compared += 1
        return out

    def _compare(self, step: StepModel, out: Any, given: Given) -> bool:
        """The decoder's row behind ids is the model's; False when the decoder has no room, raises Broken when it is another."""
        assert self.prefix is not None
        try:
            row = self.prefix.row(given.ids, given.mask, given.ids.shape[1] - 1, given.others)
        except SubquadError as error:
            self.model.note(f"some calls ran the model itself: {first_line(error)}")
            return False
        want = step.last_row(out)
        if not step.alike(row, want):
            raise Broken(
                "loop equality", f"a row of the decoder differs from the model's by {(row - want).abs().max():.1e}."
            )
        return True


@contextlib.contextmanager
def refuse_by(model: LoopModel) -> Iterator[None]:
    """Inside the block a guard that fails, or a model that has no decoder, keeps the original loop."""
    try:
        yield
    except Broken as broken:
        model.step, model.refused = None, (broken.guard, str(broken))
    except SubquadError as error:
        guard = "capture" if isinstance(error, CaptureError) else "causality"
        model.step, model.refused = None, (guard, first_line(error) + ".")


def _may_change(value: Any) -> bool:
    """True for an object of a class that is neither Python's nor torch's own, as caches are."""
    return type(value).__module__.partition(".")[0] not in ("builtins", "torch")


def _copies(value: Any) -> Any:
    """A tensor's copy; the caller may write to it once the call is over."""
    return value.clone() if isinstance(value, Tensor) else value


def _logits(prefix: PrefixCall, step: StepModel, given: Given, original: Callable[[], Any]) -> Tensor:
    """The call's logits, to be computed when they are read."""
    ids, last = given.ids, given.ids.shape[1] - 1

    def whole() -> Tensor:
        with inactive():
            found: Tensor = step.logits(original())
        return found

    def read(index: int) -> Tensor:
        try:
            return prefix.row(ids, given.mask, last if step.rows.kept != "all" else index, given.others)
        except SubquadError:
            return whole()[:, index].clone()

    if step.rows.kept == "last, flat":
        return read(last)
    rows = ids.shape[1] if step.rows.kept == "all" else 1
    return LazyLogits(read, whole, (ids.shape[0], rows, step.vocabulary), step.dtype, ids.device)


_RUN: ContextVar[LoopRun | None] = ContextVar("subquad_loop_run", default=None)
_LOCK = threading.Lock()
_BINDING = "_subquad_loop_forward"


class _Answering:
    """The forward of a model while some loop over it runs: only the calls of that loop's own thread are answered."""

    def __init__(self, root: nn.Module, previous: Any) -> None:
        self.root, self.previous, self.count = root, previous, 0
        self.__signature__ = inspect.signature(previous)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is None or run.model.root is not self.root:
            return self.previous(*args, **kwargs)
        with inactive():
            return run.call(self.previous, args, kwargs)


@contextlib.contextmanager
def inactive() -> Iterator[None]:
    """Inside the block the model's calls in this thread run the model."""
    token = _RUN.set(None)
    try:
        yield
    finally:
        _RUN.reset(token)


@contextlib.contextmanager
def bound(root: nn.Module) -> Iterator[None]:
    """Inside the block the model's calls go through whichever loop runs in the calling thread."""
    with _LOCK:
        held = root.__dict__.get("forward")
        answering = held if isinstance(held, _Answering) else _Answering(root, root.forward)
        answering.count += 1
        root.__dict__["forward"] = answering
        had = held is not None and held is not answering
        if had:
            answering.__dict__["held"] = held
    try:
        yield
    finally:
        with _LOCK:
            answering.count -= 1
            if answering.count == 0 and root.__dict__.get("forward") is answering:
                del root.__dict__["forward"]
                if "held" in answering.__dict__:
                    root.__dict__["forward"] = answering.__dict__["held"]


@contextlib.contextmanager
def active(run: LoopRun) -> Iterator[None]:
    """Inside the block the current thread's calls of the run's model are answered by the run."""
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)
