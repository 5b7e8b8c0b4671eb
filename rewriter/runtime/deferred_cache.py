"""Caches of calls that were answered elsewhere: the model makes up for the calls, in order, when somebody reads the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subquad.runtime.lazy_logits import METADATA

Call = Callable[[Any], Any]
"""One call of the model: takes the cache from before it, returns the one behind it."""
_RECORD = "_subquad_deferred"
_LENGTHS = ("get_seq_length",)
"""Methods of Hugging Face caches that say how many tokens were seen, and nothing else."""


@dataclass
class Deferred:
    """An object that calls write to, and the calls that did not run yet.

    tokens: int64 [B, T], what it will hold.  calls: in order; the first of a new object makes it from None.
    """

    kind: type
    tokens: Tensor
    new: bool
    calls: list[Call] = field(default_factory=list)


def deferred(value: Any) -> Deferred | None:
    """The record of an object whose calls are outstanding, None for any other value."""
    record = getattr(type(value), "_subquad_reads", None) and object.__getattribute__(value, "__dict__").get(_RECORD)
    return record if isinstance(record, Deferred) else None


def defer(cache: Any, tokens: Tensor, call: Call) -> None:
    """Note a call that writes to the object, which holds the tokens [B, T] behind it.  Raises TypeError where that cannot be."""
    record = deferred(cache)
    if record is None:
        record = Deferred(type(cache), tokens, False)
        object.__setattr__(cache, "__class__", _reading(record.kind))
        object.__getattribute__(cache, "__dict__")[_RECORD] = record
    record.tokens = tokens
    record.calls.append(call)


def defer_new(kind: type, tokens: Tensor, call: Call) -> Any:
    """An object of a class, made by `call` once it is read.  Raises TypeError where that cannot be."""
    cache: Any = object.__new__(_reading(kind))
    cache.__dict__[_RECORD] = Deferred(kind, tokens, True, [call])
    return cache


def settle(cache: Any) -> None:
    """Run the calls that are outstanding."""
    held = object.__getattribute__(cache, "__dict__")
    record: Deferred | None = held.pop(_RECORD, None)
    kind = type(cache).__mro__[1] if record is None else record.kind
    object.__setattr__(cache, "__class__", kind)
    if record is None:
        return
    calls = record.calls
    if record.new:
        held.update(calls[0](None).__dict__)
        calls = calls[1:]
    for call in calls:
        call(cache)


@functools.cache
def _reading(kind: type) -> type:
    """A subclass whose instances settle before anything of them is read, changed or copied."""

    def read(self: Any, name: str) -> Any:
        if name in ("__class__", "__dict__"):
            return object.__getattribute__(self, name)
        record = deferred(self)
        if record is not None and name in _LENGTHS:
            return lambda *args, **kwargs: record.tokens.shape[1]
        if record is not None and name == "crop" and _plain(record, self):
            return lambda tokens_to_remove: _crop(self, record, tokens_to_remove)
        settle(self)
        return getattr(self, name)

    def write(self: Any, name: str, value: Any) -> None:
        settle(self)
        setattr(self, name, value)

    def delete(self: Any, name: str) -> None:
        settle(self)
        delattr(self, name)

    names = {"__getattribute__": read, "__setattr__": write, "__delattr__": delete, "_subquad_reads": True}
    return type(kind.__name__, (kind,), {**names, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _plain(record: Deferred, cache: Any) -> bool:
    """True for a cache whose layers keep every token, so that cropping it is cropping its tokens."""
    held = object.__getattribute__(cache, "__dict__")
    kinds = {type(layer) for layer in held.get("layers", ())} or {held.get("layer_class_to_replicate")}
    return not record.new and {getattr(kind, "__name__", "") for kind in kinds} == {"DynamicLayer"}


def _crop(cache: Any, record: Deferred, tokens_to_remove: int) -> None:
    length = record.tokens.shape[1]
    if not 0 < -tokens_to_remove < length:
        settle(cache)
        cache.crop(tokens_to_remove)
        return
    defer(cache, record.tokens[:, : length + tokens_to_remove], lambda made: made.crop(tokens_to_remove))


@dataclass(eq=False)
class Link:
    """A cache of tensors as one call hands it back, when that call did not run yet.

    tokens: int64 [B, T], what it holds.  before: the cache that the call was given.  spec: how its tensors are nested.
    """

    tokens: Tensor
    before: Any
    call: Call
    spec: Any
    value: list[Tensor] | None = None
    versions: tuple[int, ...] = ()

    def settled(self) -> list[Tensor]:
        """The tensors; every call since the last known cache runs for them."""
        chain: list[Link] = []
        link: Link | None = self
        while link is not None and link.value is None:
            chain.append(link)
            link = link_of(link.before)
        if chain:
            cache = chain[-1].before if link is None else pytree.tree_unflatten(link.value, link.spec)  # type: ignore[arg-type]
            for one in reversed(chain):
                cache = one.call(cache)
            self.value, self.before = list(pytree.tree_leaves(cache)), None
            self.versions = _versions(self.value)
        assert self.value is not None
        return self.value

    @property
    def changed(self) -> bool:
        """True when somebody may have written to the tensors after they were read."""
        if self.value is None:
            return False
        return any(t.is_inference() for t in self.value) or self.versions != _versions(self.value)


def _versions(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in tensors)


class DeferredTensor(torch.Tensor):
    """A tensor of a `Link` with its shape and dtype and no memory; reading it settles the link."""

    _link: Link
    _place: int

    @staticmethod
    def __new__(cls, link: Link, place: int, like: Tensor, shape: tuple[int, ...]) -> DeferredTensor:
        """like: a tensor of its dtype and device."""
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        made._link, made._place = link, place
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Shapes are known; everything else works on the settled tensors."""
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_settled(args), **_settled(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Whatever passes by `__torch_function__` works on the settled tensors."""
        return func(*_settled(args), **_settled(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self._link.settled()[self._place].clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._link.settled()[self._place].__reduce_ex__(protocol)


def _settled(value: Any) -> Any:
    return pytree.tree_map(lambda v: v._link.settled()[v._place] if isinstance(v, DeferredTensor) else v, value)


def link_of(cache: Any) -> Link | None:
    """The link whose tensors a cache consists of, untouched and in their order; None for any other value."""
    leaves, spec = pytree.tree_flatten(cache)
    first = leaves[0] if leaves else None
    if not isinstance(first, DeferredTensor) or first._link.spec != spec or first._link.changed:
        return None
    ours = all(isinstance(one, DeferredTensor) and one._link is first._link for one in leaves)
    return first._link if ours and [one._place for one in leaves] == list(range(len(leaves))) else None
