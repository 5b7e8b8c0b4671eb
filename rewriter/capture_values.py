"""Branches on values of tensors: the values read while the example ran are used again in the capture, and guarded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

READS: dict[Any, str] = {
    getattr(torch.Tensor, name): name
    for name in ("__bool__", "item", "tolist", "__int__", "__float__", "__index__", "__format__")
}
"""Methods that turn the content of a tensor into a Python value, on which a forward may then branch."""
SIZED = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "view",
        "reshape",
        "expand",
        "repeat",
        "narrow",
        "as_strided",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
    )
)
"""Methods that read their sizes out of tensors when they are given as such."""
SHAPED = frozenset({torch.nonzero, torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere, torch.where})
"""Functions whose result is as long as there are true entries."""
MOST = 64
"""Tensors of more elements than this are no branch conditions."""


class ValueReads(TorchFunctionMode):
    """Remembers what a forward reads out of tensors when it runs, and answers the same reads when it is captured.

    A read is known by the line it is made from and its number there.  answered: the tensors that were read in the capture,
    in order, and what they held in the example run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[Any, Any] = {}
        self.count: dict[Any, int] = {}
        self.answered: list[tuple[torch.Tensor, Any]] = []
        self.lines: list[str] = []
        self.capturing = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SIZED:
            args = args[:1] + pytree.tree_map(self._number, args[1:])
            return func(*args, **(kwargs or {}))
        if func in SHAPED and (func is not torch.where or len(args) == 1):
            return self._shaped(func, args, kwargs or {})
        if func in (torch.equal, torch.Tensor.equal):
            return self._equal(*args, **(kwargs or {}))
        if func not in READS or not isinstance(args[0], torch.Tensor) or args[0].numel() > MOST:
            return func(*args, **(kwargs or {}))
        name, place = READS[func], _line()
        if not self.capturing:
            self._remember(place, name, args[0])
            return func(*args, **(kwargs or {}))
        key = place, name, self._next(place, name)
        if key not in self.known:
            return func(*args, **(kwargs or {}))
        self._answer(args[0], self.known[key], place)
        return _as_read(name, self.known[key], args)

    def _equal(self, input: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two tensors are equal, read as the truth of all comparisons of their elements."""
        if input is other or input.shape != other.shape:
            return input is other
        return self.__torch_function__(torch.Tensor.__bool__, (), ((input == other).all(),))

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The indices that the example run found, whose number no graph could know."""
        place = _line()
        key = place, "indices", self._next(place, "indices")
        if not self.capturing:
            result = func(*args, **kwargs)
            self.known[key] = args[0].tolist(), result
            return result
        if key not in self.known:
            return func(*args, **kwargs)
        value, result = self.known[key]
        self._answer(args[0], value, place)
        return pytree.tree_map(torch.clone, result)

    def _answer(self, tensor: torch.Tensor, value: Any, place: tuple[str, int]) -> None:
        self.answered.append((tensor, value))
        self.lines.append(f"{place[0]}:{place[1]}")

    def _number(self, value: Any) -> Any:
        """A size given as a tensor, read out of it."""
        if not isinstance(value, torch.Tensor) or value.dim() or value.dtype.is_floating_point:
            return value
        return self.__torch_function__(torch.Tensor.__index__, (), (value,))

    def _next(self, place: tuple[str, int], name: str) -> int:
        number = self.count[place, name] = self.count.get((place, name), -1) + 1
        return number

    def _remember(self, place: tuple[str, int], name: str, tensor: torch.Tensor) -> None:
        """The value under its read; torch.export takes a list apart into the reads of its items."""
        value = tensor.tolist()
        self.known[place, name, self._next(place, name)] = value
        if name == "tolist":
            for item in tensor.flatten().tolist():
                self.known[place, "item", self._next(place, "item")] = item

    @contextmanager
    def capture(self) -> Iterator[ValueReads]:
        """Inside the block reads are answered from the example run."""
        self.capturing, self.count, self.answered, self.lines = True, {}, [], []
        with self:
            yield self


def branches_on_values(error: Exception) -> bool:
    """True for what torch.export raises where a forward reads a value, or a size that depends on one, out of a tensor."""
    text = f"{type(error).__name__} {error}".lower()
    return "data-dependent" in text or "datadependent" in text or "unbacked" in text or "local_scalar_dense" in text


def _as_read(name: str, value: Any, args: Any) -> Any:
    """What a method returns for a tensor of this content."""
    if name == "tolist":
        return value
    while isinstance(value, list):
        (value,) = value
    if name == "__format__":
        return format(value, args[1])
    if name in ("__int__", "__index__"):
        return int(value)
    return {"__bool__": bool, "__float__": float}.get(name, lambda item: item)(value)


def _line() -> tuple[str, int]:
    """The innermost line outside torch."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((torch.__path__[0], __file__)):
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("", 0)
