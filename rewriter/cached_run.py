"""Run a user's loop that passes a cache along: its model's calls are answered, and the cache stays what its code may read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subquad.cache_study import Held, Keeping, long_calls, marks_of, study
from subquad.cached_call import CallForm, Parts
from subquad.capture_objects import tensors_of
from subquad.ir.errors import SubquadError
from subquad.loop_guards import checked, deterministic, readable, tokens_alone
from subquad.loop_run import COMPARED, LoopModel, LoopRun, inactive, refuse_by
from subquad.output_place import at, places, spellings
from subquad.runtime.deferred_cache import DeferredTensor, Link, defer, defer_new, deferred, link_of
from subquad.runtime.lazy_logits import LazyLogits
from subquad.step_model import Given, StepModel, step_model

FEW = 8
"""Rows of one call up to which they are computed one by one."""


def pays(step: StepModel) -> bool:
    """Whether answering a call costs less than the call: with a cache it is one of a single token, which only programs that
    are compiled beat."""
    return step.decoder.ready


class CachedRun(LoopRun):
    """One execution of a loop whose calls take a cache and new tokens alone."""

    def __init__(self, model: LoopModel) -> None:
        super().__init__(model)
        self.known: list[Held] = []
        self.calls = 0

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one call of the model."""
        model, keeping = self.model, self._keeping()
        why = self._why_original(kwargs) if model.refused is None else None
        if keeping is None or model.refused is not None or why is not None:
            return self._original(original, args, kwargs, why)
        parts = keeping.form.read(args, kwargs)
        if isinstance(parts, str):
            return self._original(original, args, kwargs, parts)
        before = self._tokens(parts)
        if before is None:
            return self._original(original, args, kwargs, "its cache was filled, read or changed by other code")
        if parts.cache is None and model.step is not None and keeping.place is None and self.calls > 0:
            with refuse_by(model):
                readable(model.step, model.uses)
            return super().call(original, args, kwargs)
        self.calls += 1
        if model.step is None:
            keeping.empty = copy.deepcopy(parts.cache)
        whole, why = keeping.form.whole(parts, before, copy.deepcopy(keeping.empty))
        tokens = torch.cat([before, parts.ids], 1)
        given: Given | None = None
        if why is None and model.step is not None:
            given, why = model.step.bound((), whole)
        if why is not None:
            out = self._original(original, args, kwargs, why)
            self._remember(parts, out, tokens)
            return out
        if model.step is None or given is None:
            return self._begin(original, args, kwargs, parts, whole)
        self.ready()
        if model.compared >= COMPARED and not pays(model.step):
            model.note("the loop's own cache served while the decoder's programs were not compiled")
            model.step.compile()
            out = self._original(original, args, kwargs, None)
            self._remember(parts, out, tokens)
            return out
        if model.compared < COMPARED or keeping.tested < tokens.shape[1] or self._needs_shapes(parts):
            return self._beside(original, args, kwargs, parts, given)
        return self._answered(original, parts, given, tokens, whole)

    def _keeping(self) -> Keeping | None:
        model = self.model
        if model.keeping is None and model.refused is None:
            try:
                model.keeping = Keeping(CallForm(model.root))
            except ValueError as error:
                model.refused = "cache", str(error)
        return model.keeping

    def _needs_shapes(self, parts: Parts) -> bool:
        """True for the first call of a run whose cache is handed back as tensors: their shapes are then not known yet."""
        keeping = self.model.keeping
        return parts.cache is None and keeping is not None and keeping.kind is None

    def _original(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], why: str | None
    ) -> Any:
        if why is not None:
            self.model.note(f"some calls ran the model itself: {why}")
        self.model.original += 1
        return original(*args, **kwargs)

    def _tokens(self, parts: Parts) -> Tensor | None:
        """The tokens [B, P] in the cache of a call, None when they are not known."""
        cache, none = parts.cache, parts.ids[:, :0]
        found: Tensor | None = None
        if cache is None:
            found = none
        elif (record := deferred(cache)) is not None:
            found = record.tokens
        elif (link := link_of(cache)) is not None:
            found = link.tokens
        elif (held := self._held(cache)) is not None:
            found = held.tokens
        elif _empty(cache):
            found = none
        return found if found is not None and found.shape[0] == parts.ids.shape[0] else None

    def _held(self, cache: Any) -> Held | None:
        return next((one for one in reversed(self.known) if one.matches(cache)), None)

    def _remember(self, parts: Parts, out: Any, tokens: Tensor) -> None:
        """Keep what the model itself handed back, or wrote to, as caches of these tokens."""
        found = [(place, value) for place, value in places(out) if tensors_of(value)]
        if parts.cache is not None and not any(value is parts.cache for _, value in found):
            found.append((None, parts.cache))
        self.known = [Held(place, value, marks_of(value), tokens) for place, value in found]

    def _begin(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], parts: Parts,
        whole: dict[str, Any],
    ) -> Any:  # fmt: skip
        """The first call: the model answers, and is captured, derived and tested beside it."""
        model = self.model
        model.original += 1
        model.built += 1
        kept = {name: v.clone() if isinstance(v, Tensor) else v for name, v in whole.items()}
        out = original(*args, **kwargs)
        with refuse_by(model):
            tokens_alone(model.root, (), kept)
            model.step = step_model(model.root, (), kept, out)
            place = model.step.place
            held = deterministic(model.root, lambda **given: at(original(**given), place), (), kept, at(out, place))
            model.passed = [held, *checked(model.step, original, (), kept, out)]
        self._remember(parts, out, parts.ids.clone())
        return out

    def _beside(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], parts: Parts,
        given: Given,
    ) -> Any:  # fmt: skip
        """A call that the model answers while the decoder's row is compared with its, and its cache is studied."""
        model, keeping, step = self.model, self.model.keeping, self.model.step
        assert keeping is not None
        assert step is not None
        assert self.prefix is not None
        model.original += 1
        given = given.copied()
        tokens = given.ids
        held = None if parts.cache is None else self._held(parts.cache)
        shapes = None if held is None else [t.shape for t, _ in held.marks]
        out = original(*args, **kwargs)
        with refuse_by(model):
            self._compare(step, out, given)
            if held is not None and shapes is not None:
                study(keeping, held, shapes, out, parts)
                readable(step, model.uses, spellings(keeping.place, out))
                model.compared += 1
            if model.compared >= COMPARED and keeping.tested < tokens.shape[1]:
                model.passed.append(long_calls(original, keeping, step, parts, tokens.shape[1]))
        self._remember(parts, out, tokens)
        return out

    def _answered(
        self, original: Callable[..., Any], parts: Parts, given: Given, tokens: Tensor, whole: dict[str, Any]
    ) -> Any:
        """The result of a call that the model does not run; the cache in it is made when somebody reads it."""
        keeping, step = self.model.keeping, self.model.step
        assert keeping is not None
        assert step is not None
        self.count()
        mask = given.copied().mask
        call = _put_off(original, keeping, parts)
        others: dict[Any, Any] = {}
        if keeping.kind is None:
            others[keeping.place] = _linked(keeping, parts, tokens, call)
        elif parts.cache is None:
            others[keeping.place] = defer_new(keeping.kind, tokens, call)
        else:
            defer(parts.cache, tokens, call)
            if keeping.place is not None:
                others[keeping.place] = parts.cache
        return step.returned(self._rows(step, original, whole, tokens, mask, parts.ids.shape[1]), others)

    def _rows(
        self, step: StepModel, original: Callable[..., Any], whole: dict[str, Any], tokens: Tensor, mask: Tensor | None,
        width: int,
    ) -> Tensor:  # fmt: skip
        """The logits of the call's own tokens, computed when they are read."""
        prefix, past = self.prefix, tokens.shape[1] - width
        assert prefix is not None
        kept = {name: v.clone() if isinstance(v, Tensor) else v for name, v in whole.items()}

        def every() -> Tensor:
            if width <= FEW or step.rows.kept != "all":
                places = range(past, past + width) if step.rows.kept == "all" else [past + width - 1]
                return torch.stack([prefix.row(tokens, mask, place) for place in places], 1)
            with inactive():
                return step.logits(original(**kept))[:, past:].clone()

        def read(index: int) -> Tensor:
            try:
                return prefix.row(tokens, mask, past + index if step.rows.kept == "all" else past + width - 1)
            except SubquadError:
                with inactive():
                    return step.logits(original(**kept))[:, past + index].clone()

        if step.rows.kept == "last, flat":
            return read(width - 1)
        rows = width if step.rows.kept == "all" else 1
        return LazyLogits(read, every, (tokens.shape[0], rows, step.vocabulary), step.dtype, tokens.device)


def _put_off(original: Callable[..., Any], keeping: Keeping, parts: Parts) -> Callable[[Any], Any]:
    """The call as it would have been: takes the cache before it, returns the one behind it."""
    given: dict[str, Any] = {keeping.form.ids: parts.ids.clone(), **parts.rest}
    given.update({name: v.clone() if isinstance(v, Tensor) else v for name, v in parts.positions.items()})
    if parts.mask is not None:
        given[parts.mask[0]] = parts.mask[1].clone()
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    passed = keeping.form.cache

    def call(cache: Any) -> Any:
        with inactive(), torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            out = original(**given, **{passed: cache})
        return cache if keeping.kind is not None and cache is not None else at(out, keeping.place)

    return call


def _linked(keeping: Keeping, parts: Parts, tokens: Tensor, call: Callable[[Any], Any]) -> Any:
    """A cache of tensors behind a call that did not run."""
    leaves, spec = pytree.tree_flatten(parts.cache)
    link = Link(tokens, parts.cache, call, spec)
    shapes = [list(leaf.shape) for leaf in leaves]
    for shape, axis in zip(shapes, keeping.axes, strict=True):
        shape[axis] += parts.ids.shape[1]
    made = [
        DeferredTensor(link, n, leaf, tuple(shape)) for n, (leaf, shape) in enumerate(zip(leaves, shapes, strict=True))
    ]
    return pytree.tree_unflatten(made, spec)


def _empty(cache: Any) -> bool:
    """True for a cache object that holds nothing yet."""
    if isinstance(cache, (tuple, list, dict, Tensor)):
        return not isinstance(cache, Tensor) and not tensors_of(cache)
    length = getattr(cache, "get_seq_length", None)
    return int(length()) == 0 if length is not None else not tensors_of(cache)
