"""Tables that a forward keeps in plain attributes and makes anew for other sizes, as those of rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from subquad.capture_recipes import KEPT, PLAIN
from subquad.estimated_error import relative_error
from subquad.ir.graph import node_inputs, value_of

OWN = frozenset(vars(torch.nn.Module())) | {"forward"}
"""Attributes that are no plain ones of the user's: parameters, buffers, hooks; a forward that is bound is ours."""
ABSENT: Any = object()
SHAPE_ALONE = frozenset({"sym_size", "zeros_like", "ones_like", "full_like", "empty_like"})
"""Operations that read the shape and dtype of a tensor and nothing in it."""
DTYPE_OF_SECOND = frozenset({"type_as", "expand_as", "view_as"})
NEW = "new_"


class AssignedAttributes(RuntimeError):
    """A forward that is being captured assigned tensors to plain attributes, of which nothing is known."""


class PlainAttributes:
    """The plain attributes of a module tree, and of plain objects that hang on its modules, as they are now."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.before = {path: (holder, _plain(holder)) for path, holder in _holders(model)}

    def changed(self) -> Iterator[tuple[str, Any, str, Any, Any]]:
        """(dotted name, holder, attribute, old value, new value) of each that is another object or number now."""
        for path, (holder, before) in self.before.items():
            now = _plain(holder)
            for name in [*before, *(new for new in now if new not in before)]:
                old, new = before.get(name, ABSENT), now.get(name, ABSENT)
                if old is not new and not (isinstance(old, int | float) and type(old) is type(new) and old == new):
                    yield f"{path}.{name}".lstrip("."), holder, name, old, new

    def restore(self) -> None:
        """Put back what changed."""
        for _, holder, name, old, _ in list(self.changed()):
            _set(holder, name, old)


@contextmanager
def attributes_kept(model: torch.nn.Module) -> Iterator[PlainAttributes]:
    """Inside the block the forward may assign plain attributes; they are put back at its end."""
    kept = PlainAttributes(model)
    try:
        yield kept
    finally:
        kept.restore()


@dataclass(frozen=True)
class Tables:
    """Attributes that hold what depends on sizes alone; places: holder, attribute, and the value that says it is missing."""

    names: tuple[str, ...]
    places: tuple[tuple[Any, str, Any], ...]

    def clear(self) -> None:
        """Make the next call of the forward fill them."""
        for holder, name, missing in self.places:
            _set(holder, name, missing)


def keeps_tensors(model: torch.nn.Module) -> bool:
    """True where a plain attribute holds a tensor."""
    return any(isinstance(value, torch.Tensor) for _, holder in _holders(model) for value in _plain(holder).values())


def tables_of(
    model: torch.nn.Module, call: Callable[[Any], Sequence[torch.Tensor]], given: Any, longer: Any, other: Any
) -> Tables | None:
    """The attributes that the forward fills with tables, None where it keeps none or what it keeps changes later results.

    call: the floating outputs of the forward for the arguments `given`, `longer` (one more in every length) or `other`
    (other content).  Attributes that these calls assign are tables when every call gives, whatever calls went before it,
    what it gives with all of them missing; that they hold nothing of the inputs is left to `data_behind`, on the graph.
    """
    with attributes_kept(model) as kept:
        found: dict[str, tuple[Any, str, list[Any]]] = {}
        try:
            for one in (longer, given):
                call(one)
                for path, holder, name, old, new in kept.changed():
                    found.setdefault(path, (holder, name, []))[2].extend((old, new))
        except Exception:  # a length that the forward does not take
            return None
        if not any(isinstance(v, torch.Tensor) for _, _, values in found.values() for v in values):
            return None
        for absent in (None, ABSENT):
            tables = Tables(
                tuple(sorted(found)), tuple((h, name, _missing(values, absent)) for h, name, values in found.values())
            )
            try:
                if _whatever_went_before(tables, call, given, longer, other):
                    return tables
            except Exception:  # a forward that takes the other sign of a missing table
                continue
    return None


def _whatever_went_before(
    tables: Tables, call: Callable[[Any], Sequence[torch.Tensor]], given: Any, longer: Any, other: Any
) -> bool:
    wanted = []
    for one in (longer, given):
        tables.clear()
        wanted.append(list(call(one)))
    for history, one, expected in (
        ((given,), given, wanted[1]), ((given,), longer, wanted[0]), ((longer,), given, wanted[1]), ((other,), given, wanted[1]),
        ((longer, given, other), longer, wanted[0]),
    ):  # fmt: skip
        tables.clear()
        for before in history:
            call(before)
        found = list(call(one))
        if len(found) != len(expected) or any(
            x.shape != y.shape or not relative_error(x, y) <= torch.finfo(y.dtype).eps ** 0.5
            for x, y in zip(found, expected, strict=True)
        ):
            return False
    return True


def data_behind(outputs: Iterable[torch.fx.Node]) -> str | None:
    """The name of an input tensor whose content, not only its sizes, reaches one of these nodes of a lifted graph."""
    pending, seen = list(outputs), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and isinstance(value_of(node), torch.Tensor):
            return str(node.name)
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        if name in SHAPE_ALONE or name.startswith(NEW):
            continue
        pending.extend(node_inputs(node.args[:1] if name in DTYPE_OF_SECOND else (node.args, node.kwargs)))
    return None


def _missing(values: list[Any], absent: Any) -> Any:
    """What says that a table is missing, or that it was made for no size, in the place of one of these values."""
    if any(value is ABSENT for value in values):
        return ABSENT
    if any(value is None for value in values):
        return None
    if any(isinstance(value, torch.Tensor) for value in values):
        return absent
    return -1 if isinstance(values[0], int) and not isinstance(values[0], bool) else values[0]


def _holders(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        yield path, module
        for name, value in _plain(module).items():
            if hasattr(value, "__dict__") and not isinstance(value, (*PLAIN, *KEPT, list, tuple, dict, set, frozenset)):
                yield f"{path}.{name}", value


def _plain(holder: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(holder).items() if name not in OWN}


def _set(holder: Any, name: str, value: Any) -> None:
    if value is ABSENT:
        vars(holder).pop(name, None)
    else:
        vars(holder)[name] = value
