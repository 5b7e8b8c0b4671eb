"""Tell the parts of a model's call apart (new tokens, cache, positions, mask), and write the same call without a cache."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad.passes.recognize.loop_context import POSITIONS

_CACHE = re.compile(r"^(past.*|layer_past|.*cache|.*caches|kv|kvs|.*_kv|mems|states?|.*_states?|memory)$")
_OTHER = ("use_", "cache_position", "encoder", "head_mask")


@dataclass(frozen=True)
class Parts:
    """One call.

    ids: int64 [B, w].  cache: what is passed as the cache, None for none.  positions: by parameter.  mask: (parameter,
    tensor) or None.  rest: everything else that was given, by parameter.
    """

    ids: Tensor
    cache: Any
    positions: dict[str, Any]
    mask: tuple[str, Tensor] | None
    rest: dict[str, Any]


class CallForm:
    """How a model's forward is called in a loop that passes a cache along.

    cache, ids: the names of these parameters.
    """

    def __init__(self, root: nn.Module) -> None:
        """Raises ValueError with a sentence when no parameter of the forward can be the cache."""
        self.signature = inspect.signature(type(root).forward)
        names = list(self.signature.parameters)[1:]
        caches = [name for name in names if _CACHE.match(name) and not any(word in name for word in _OTHER)]
        if not caches:
            raise ValueError("no parameter of the model's forward is named as a cache is.")
        self.cache = caches[0]
        self.root = root
        self.ids = ""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts | str:
        """The parts of a call, or why they cannot be told apart."""
        try:
            bound = self.signature.bind(self.root, *args, **kwargs)
        except TypeError as error:
            return str(error)
        given: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                return "its forward takes any number of arguments"
            given.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        cache = given.pop(self.cache, None)
        if not self.ids:
            self.ids = next((name for name, value in given.items() if _is_ids(name, value)), "")
        ids = given.pop(self.ids, None)
        if not _is_ids("", ids):
            return "it is not given token ids [batch, tokens]"
        mask = next(((n, v) for n, v in given.items() if "mask" in n and isinstance(v, Tensor)), None)
        positions = {
            n: v for n, v in given.items() if "mask" not in n and any(word in n for word in POSITIONS) and _is_place(v)
        }
        rest = {n: v for n, v in given.items() if n not in positions and (mask is None or n != mask[0])}
        return Parts(ids, cache, positions, mask, rest)

    def whole(self, parts: Parts, before: Tensor, empty: Any) -> tuple[dict[str, Any], str | None]:
        """The call on all tokens at once, without a cache; and why it would be another one.

        before: the tokens [B, P] that the cache holds.  empty: the cache at the start, where the forward needs one.
        """
        past, width = before.shape[1], parts.ids.shape[1]
        tokens = torch.cat([before, parts.ids], 1)
        call = {self.ids: tokens, **parts.rest}
        for name, value in parts.positions.items():
            if not _follows(value, past, width):
                return {}, f"its `{name}` are not the places of the tokens"
            if self._default(name) is not None:
                call[name] = _places(value, past + width)
        if parts.mask is not None:
            name, mask = parts.mask
            if mask.shape != tokens.shape:
                return {}, f"its `{name}` of shape {list(mask.shape)} does not cover the {past + width} tokens so far"
            call[name] = mask
        if self._default(self.cache) is not None:
            call[self.cache] = empty
        return call, None

    def call(self, parts: Parts, ids: Tensor, cache: Any, past: int) -> dict[str, Any]:
        """A call of this form on other tokens [B, w] behind a cache that holds `past` columns, none of them padding."""
        made = {self.ids: ids, self.cache: cache, **parts.rest}
        made.update({name: _places(value, ids.shape[1], past) for name, value in parts.positions.items()})
        if parts.mask is not None:
            made[parts.mask[0]] = parts.mask[1].new_ones(ids.shape[0], past + ids.shape[1])
        return made

    def _default(self, name: str) -> Any:
        """The default of a parameter; one that has none, or is not the forward's own, gives the marker `empty`."""
        parameter = self.signature.parameters.get(name)
        return inspect.Parameter.empty if parameter is None else parameter.default


def _is_ids(name: str, value: Any) -> bool:
    integers = isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32)
    return integers and "mask" not in name and not any(word in name for word in POSITIONS)


def _is_place(value: Any) -> bool:
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return whole or (isinstance(value, int) and not isinstance(value, bool))


def _follows(value: Any, past: int, width: int) -> bool:
    """True for the first place, or the places of `width` tokens behind `past`."""
    if isinstance(value, int):
        return value == past
    if value.dim() == 0:
        return int(value) == past
    places = torch.arange(past, past + width, device=value.device)
    return bool(value.shape[-1] == width and (value == places).all())


def _places(like: Any, count: int, past: int = 0) -> Any:
    """`count` places behind `past`, in the form of `like`."""
    if isinstance(like, int):
        return past
    if like.dim() == 0:
        return torch.full_like(like, past)
    places = torch.arange(past, past + count, dtype=like.dtype, device=like.device)
    return places.expand(*like.shape[:-1], count)
