"""What a model does to the cache that a loop passes along, seen on its own calls: how it grows, and that it holds everything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subquad.cached_call import CallForm, Parts
from subquad.capture_objects import tensors_of
from subquad.ir.errors import first_line
from subquad.loop_guards import Broken
from subquad.output_place import at, places
from subquad.runtime.prefix_call import PrefixCall
from subquad.step_model import StepModel

LEAST = 64
"""Tokens at which calls with a cache are first compared with calls on all tokens; again at twice as many as a loop has."""


@dataclass
class Keeping:
    """What is known of the cache that a loop passes along.

    place: where a call hands it back.  kind: its class, where calls write to it; None for tensors that are handed back.
    axes: for each tensor the axis that grows.  empty: what the first call was given.  tested: tokens up to which calls with
    the cache were seen to agree with calls on all tokens.
    """

    form: CallForm
    empty: Any = None
    place: Any = None
    kind: type | None = None
    axes: tuple[int, ...] = ()
    tested: int = 0


@dataclass(frozen=True)
class Held:
    """A cache that holds these tokens [B, T], as long as its tensors stay the ones they were."""

    place: Any
    value: Any
    marks: list[tuple[Tensor, int]]
    tokens: Tensor

    def matches(self, cache: Any) -> bool:
        """True for the same object, or the same tensors nested alike, none of them written to."""
        if not (cache is self.value or isinstance(cache, (tuple, list, dict, Tensor))):
            return False
        found = marks_of(cache)
        return len(found) == len(self.marks) and all(
            a is b and n == m for (a, n), (b, m) in zip(found, self.marks, strict=True)
        )


def marks_of(value: Any) -> list[tuple[Tensor, int]]:
    """The tensors in a value, with a mark that changes when one is written to."""
    return [(t, 0 if t.is_inference() else t._version) for t in tensors_of(value)]


def study(keeping: Keeping, held: Held, shapes: list[torch.Size], out: Any, parts: Parts) -> None:
    """Learn where and how a call hands its cache back.  Raises Broken when what it does cannot be put off."""
    cache = parts.cache
    found = next((place for place, value in places(out) if value is cache), held.place)
    if _changed(cache, held):
        if isinstance(cache, (tuple, list, dict, Tensor)):
            raise Broken("cache", f"the model writes into the {type(cache).__name__} that is passed as its cache.")
        keeping.kind, keeping.place = type(cache), found
        return
    after = None if found is None else tensors_of(at(out, found))
    if after is None or len(after) != len(shapes) or pytree.tree_flatten(cache)[1] != _spec(at(out, found)):
        raise Broken("cache", "the model hands its cache back in another form than it takes it.")
    grown = [_grown(old, new.shape, parts.ids.shape[1]) for old, new in zip(shapes, after, strict=True)]
    if any(axis is None for axis in grown):
        raise Broken("cache", "the tensors of the cache do not grow by the tokens that a call is given.")
    keeping.place, keeping.kind, keeping.axes = found, None, tuple(axis for axis in grown if axis is not None)


def long_calls(original: Callable[..., Any], keeping: Keeping, step: StepModel, parts: Parts, total: int) -> str:
    """Calls with a cache agree with calls on all tokens when there are many; raises Broken when they do not."""
    limit = step.decoder.programs.layout.limit
    size = max(LEAST, 2 * total) if limit is None else min(limit, max(LEAST, 2 * total))
    ids = torch.randint(step.vocabulary, (parts.ids.shape[0], size), generator=torch.Generator().manual_seed(0))
    ids, form, prefix = ids.to(parts.ids), keeping.form, PrefixCall(step.decoder.engine)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        cache = copy.deepcopy(keeping.empty)
        try:
            for start, stop in ((0, size - 2), (size - 2, size - 1), (size - 1, size)):
                out = original(**form.call(parts, ids[:, start:stop], cache, start))
                cache = cache if keeping.kind is not None and cache is not None else at(out, keeping.place)
                row, want = prefix.row(ids[:, :stop], None, stop - 1), step.last_row(out)
                if not step.alike(row, want):
                    reason = f"behind {start} tokens a call with the cache differs from one on all {size} tokens"
                    raise Broken("cache", f"{reason} by {(row - want).abs().max():.1e}.")
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise Broken("cache", f"a call behind {size - 2} tokens fails: {first_line(error)}.") from error
    keeping.tested = size
    return f"cache: calls with it agree with calls on all tokens, up to {size} of them"


def _changed(cache: Any, held: Held) -> bool:
    found = marks_of(cache)
    return len(found) != len(held.marks) or any(
        a is not b or n != m for (a, n), (b, m) in zip(found, held.marks, strict=True)
    )


def _spec(value: Any) -> Any:
    return pytree.tree_flatten(value)[1]


def _grown(old: torch.Size, new: torch.Size, width: int) -> int | None:
    """The one axis along which a shape grew by `width`."""
    if len(old) != len(new):
        return None
    axes = [n for n, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 and new[axes[0]] == old[axes[0]] + width else None
