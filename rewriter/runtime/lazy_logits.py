"""Logits [B, T, V] whose rows are computed when they are read, so that a loop that reads the last row pays for that row alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class RowSource(Protocol):
    """Where rows come from."""

    def row(self, index: int) -> Tensor:
        """The logits [B, V] behind token `index`, in memory of their own."""

    def full(self) -> Tensor:
        """All logits [B, T, V], in memory of their own."""


class LazyLogits(torch.Tensor):
    """A tensor with the shape, dtype and device of the logits and no memory.

    Reading one token's row by indexing or `select` asks the source for it; a cast, a copy and a product or quotient with a
    number stay lazy; every other operation works on all rows, which are then computed once.  Rows and all rows are the
    same memory to the caller as long as only one of the two kinds is asked for: a row changed in place keeps the change.
    """

    _axis: int
    _read: Callable[[int], Tensor]
    _whole: Callable[[], Tensor]
    _rows: dict[int, Tensor]
    _seen: dict[int, int]
    _full: Tensor | None
    _copies: list[weakref.ref[LazyLogits]]

    @staticmethod
    def __new__(
        cls, read: Callable[[int], Tensor], whole: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype,
        device: torch.device, axis: int = 1,
    ) -> LazyLogits:  # fmt: skip
        """read: row by token index.  whole: all rows.  axis: the axis of the tokens."""
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        made._read, made._whole, made._axis = read, whole, axis
        made._rows, made._seen, made._full, made._copies = {}, {}, None, []
        return made  # type: ignore[no-any-return]

    def _row(self, index: int) -> Tensor:
        """The row as it is handed out, the same memory each time."""
        if index not in self._rows:
            self._rows[index] = self._read(index)
            self._seen[index] = _mark(self._rows[index])
        for reference in self._copies:
            if (copy := reference()) is not None and copy._full is None:
                copy._row(index)
        return self._rows[index]

    def _all(self) -> Tensor:
        """All rows; what was changed in a row that was handed out is changed in them."""
        full = self._full
        if full is None:
            full = self._full = self._whole()
            for index, row in self._rows.items():
                if row.is_inference() or _mark(row) != self._seen[index]:
                    full.select(self._axis, index).copy_(row)
        copies, self._copies = self._copies, []
        for reference in copies:
            if (copy := reference()) is not None:
                copy._all()
        return full

    def _copied(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A copy with a function applied to every row."""
        if self._full is not None or self._rows:
            return function(self._all())
        dtype = function(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        copy = LazyLogits(
            lambda index: function(self._pristine(index)), lambda: function(self._all()),
            self.shape, dtype, self.device, self._axis,
        )  # fmt: skip
        self._copies.append(weakref.ref(copy))
        return copy

    def _pristine(self, index: int) -> Tensor:
        if index not in self._rows:
            self._rows[index] = self._read(index)
            self._seen[index] = _mark(self._rows[index])
        return self._rows[index]

    def _picked(self, batch: int) -> Tensor:
        """The logits [T, V] of one batch row, the same memory."""
        return LazyLogits(
            lambda index: self._row(index)[batch],
            lambda: self._all()[batch],
            self.shape[1:],
            self.dtype,
            self.device,
            0,
        )

    def _indexed(self, index: Any) -> Tensor | None:
        """The result of reading `index`, None when it takes more than one row."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if any(part is None or isinstance(part, bool) for part in parts):
            return None
        if any(part is Ellipsis for part in parts):
            place = next(n for n, part in enumerate(parts) if part is Ellipsis)
            parts[place : place + 1] = [slice(None)] * (self.dim() - len(parts) + 1)
        parts += [slice(None)] * (self.dim() - len(parts))
        if len(parts) != self.dim():
            return None
        token, rest = parts.pop(self._axis), parts
        if any(not isinstance(part, (int, slice)) for part in rest):
            return None
        rows = self.shape[self._axis]
        if (
            isinstance(token, Tensor)
            and token.dim() == 0
            and not token.is_floating_point()
            and token.dtype != torch.bool
        ):
            token = int(token)
        if isinstance(token, int):
            return self._row(token % rows)[tuple(rest)] if -rows <= token < rows else None
        if token == slice(None) and self._axis == 1 and isinstance(rest[0], int) and rest[1] == slice(None):
            batch = rest[0]
            return self._picked(batch) if -self.shape[0] <= batch < self.shape[0] else None
        if isinstance(token, slice) and len(range(*token.indices(rows))) == 1:
            return self._row(token.indices(rows)[0]).unsqueeze(self._axis)[tuple(_put(rest, self._axis, slice(None)))]
        if token in ([-1], [rows - 1]) and all(part == slice(None) for part in rest):
            return self._row(rows - 1).unsqueeze(self._axis).clone()
        return None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers what needs one row or none; everything else works on all rows."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and first._full is None:
            answer = _lazily(first, func, args[1:], kwargs)
            if answer is not None:
                return answer
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Whatever passes by `__torch_function__` works on all rows."""
        return func(*_plain(args), **_plain(kwargs or {}))


def _mark(row: Tensor) -> int:
    """Changes when a row is written to; rows of inference mode are not watched."""
    return 0 if row.is_inference() else row._version


def _put(parts: list[Any], place: int, part: Any) -> list[Any]:
    return [*parts[:place], part, *parts[place:]]


def _plain(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value._all()
    if isinstance(value, (list, tuple)) and any(isinstance(item, (LazyLogits, list, tuple)) for item in value):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _lazily(logits: LazyLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.Tensor.__getitem__:
        return logits._indexed(*args)
    if func in (torch.Tensor.select, torch.select):
        named = dict(zip(("dim", "index"), args, strict=False)) | kwargs
        dim, index = named.get("dim"), named.get("index")
        if isinstance(dim, int) and dim % logits.dim() == logits._axis and isinstance(index, int):
            return logits._indexed((slice(None),) * logits._axis + (index,))
        return None
    if func is torch.Tensor.squeeze and args == (0,) and not kwargs and logits._axis == 1 and logits.shape[0] == 1:
        return logits._picked(0)
    if func in _SAME:
        return logits if not args and not kwargs else None
    if func in _CASTS or func in _SCALED:
        if any(isinstance(arg, Tensor) for arg in (*args, *kwargs.values())):
            return None
        if (
            func in _CASTS
            and func(torch.empty(0, dtype=logits.dtype, device=logits.device), *args, **kwargs).device != logits.device
        ):
            return None
        if func in _CASTS and not kwargs and func(empty := torch.empty(0, dtype=logits.dtype), *args) is empty:
            return logits
        return logits._copied(lambda rows: func(rows, *args, **kwargs))
    return None


METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_sparse", "is_quantized")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.__len__, torch.Tensor.numel, torch.Tensor.is_floating_point}
_SAME = {torch.Tensor.detach, torch.Tensor.contiguous, torch.Tensor.cpu}
_CASTS = {
    torch.Tensor.to, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.type,
}  # fmt: skip
_SCALED = {
    torch.Tensor.clone, torch.Tensor.div, torch.Tensor.mul, torch.Tensor.__truediv__, torch.Tensor.__mul__,
    torch.Tensor.__rmul__, torch.div, torch.mul,
}  # fmt: skip
