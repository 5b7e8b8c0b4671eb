"""Tables that a forward keeps in its modules and makes anew for other sizes, as those of rotary embeddings."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.fx

from subquad.capture_by_size import BySize
from subquad.capture_recipes import KEPT, PLAIN
from subquad.estimated_error import relative_error
from subquad.ir.graph import node_inputs, value_of

Module = torch.nn.Module
OWN = frozenset(vars(Module())) | {"forward"}
"""Attributes that are no plain ones of the user's: parameters, buffers, hooks; a forward that is bound is ours."""
ABSENT: Any = object()
BY_SIZE: Any = object()
"""Says that a dictionary holds a table for each size."""
SHAPE_ALONE = frozenset({"sym_size", "zeros_like", "ones_like", "full_like", "empty_like"})
"""Operations that read the shape and dtype of a tensor and nothing in it."""
DTYPE_OF_SECOND = frozenset({"type_as", "expand_as", "view_as"})
NEW = "new_"
Contents = dict[Any, Any]


class AssignedAttributes(RuntimeError):
    """A forward that is being captured assigned tensors to plain attributes, of which nothing is known."""


class PlainAttributes:
    """The plain attributes of a module tree, of plain objects and dictionaries that hang on its modules, as they are now.

    buffers: buffers that are empty are looked at too; "all": and those that are not persistent.
    """

    def __init__(self, model: Module, buffers: str = "empty") -> None:
        self.before = [(holder, _plain(holder)) for holder in _holders(model, buffers)]

    def changed(self) -> Iterator[tuple[str, Contents, Any, Any, Any]]:
        """(dotted name, contents, key, old value, new value) of each that is another object or number now."""
        for holder, before in self.before:
            now = _plain(holder)
            for key in [*before, *(new for new in now if new not in before)]:
                old, new = before.get(key, ABSENT), now.get(key, ABSENT)
                if old is not new and not (isinstance(old, int | float) and type(old) is type(new) and old == new):
                    yield holder.name(key), holder.contents, key, old, new

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """The tensors that were assigned, by dotted name; of a dictionary all that it was given."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, _, _, _, new in self.changed():
            values = [value for _, value in new.pairs] if isinstance(new, BySize) else [new]
            for value in values:
                for one in value if isinstance(value, tuple | list) else [value]:
                    if isinstance(one, torch.Tensor):
                        found.setdefault(name, []).append(one)
        return found

    def restore(self) -> None:
        """Put back what changed."""
        for _, holder, key, old, _ in list(self.changed()):
            _set(holder, key, old)


@contextmanager
def attributes_kept(model: Module, buffers: str = "empty") -> Iterator[PlainAttributes]:
    """Inside the block the forward may assign plain attributes; they are put back at its end."""
    kept = PlainAttributes(model, buffers)
    try:
        yield kept
    finally:
        kept.restore()


@dataclass(frozen=True)
class Tables:
    """What a model keeps that depends on sizes alone; places: holder, key, and the value that says it is missing.

    registered: identity of the module and name of those that are buffers, which are plain attributes while they are missing.
    """

    names: tuple[str, ...]
    places: tuple[tuple[Contents, Any, Any], ...]
    registered: frozenset[tuple[int, str]] = frozenset()

    @contextmanager
    def missing(self) -> Iterator[None]:
        """Inside the block the next call of the forward fills them; at its end they are what they were."""
        held = [(holder, key, holder.get(key, ABSENT)) for holder, key, _ in self.places]
        register = Module.register_buffer

        @functools.wraps(register)
        def registered(module: Module, name: str, *rest: Any, **more: Any) -> None:
            if (id(module), name) in self.registered:
                vars(module)[name] = rest[0] if rest else more["tensor"]
            else:
                register(module, name, *rest, **more)

        try:
            for holder, key, missing in self.places:
                _set(holder, key, BySize() if missing is BY_SIZE else missing)
            with mock.patch.object(Module, "register_buffer", registered):
                yield
        finally:
            for holder, key, old in held:
                _set(holder, key, old)


def keeps_tensors(model: Module) -> bool:
    """True where a plain attribute holds a tensor."""
    return any(isinstance(value, torch.Tensor) for holder in _holders(model, "") for value in _plain(holder).values())


def fills_buffers(model: Module) -> bool:
    """True where a method other than a constructor registers a buffer, or assigns one that is not persistent or empty."""
    for module in model.modules():
        names = {
            name: x for name, x in module._buffers.items() if x is None or name in module._non_persistent_buffers_set
        }
        for kind in type(module).__mro__[: type(module).__mro__.index(Module)]:
            codes = [
                f.__code__ for name, f in vars(kind).items() if isinstance(f, types.FunctionType) and name != "__init__"
            ]
            if any("register_buffer" in code.co_names for code in codes):
                return True
            if any(names.keys() & _stored(code) for code in codes if names.keys() & set(code.co_names)):
                return True
    return False


def _stored(code: types.CodeType) -> set[str]:
    return {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}


def tables_of(
    model: Module, call: Callable[[Any], Sequence[torch.Tensor]], given: Any, longer: Any, other: Any
) -> Tables | None:
    """What the forward fills with tables, None where it keeps none or what it keeps changes later results.

    call: the floating outputs of the forward for the arguments `given`, `longer` (one more in every length) or `other`
    (other content).  Attributes that these calls assign are tables when every call gives, whatever calls went before it,
    what it gives with all of them missing; that they hold nothing of the inputs is left to `data_behind`, on the graph.
    """
    with attributes_kept(model, buffers="all") as kept:
        found: dict[str, tuple[Contents, Any, list[Any]]] = {}
        try:
            for one in (longer, given):
                call(one)
                for name, holder, key, old, new in kept.changed():
                    found.setdefault(name, (holder, key, []))[2].extend((old, new))
        except Exception:  # a length that the forward does not take
            return None
        if not any(isinstance(x, torch.Tensor) for _, _, values in found.values() for v in values for x in _items(v)):
            return None
    for absent in (None, ABSENT):
        tables = _tables(model, found, absent)
        try:
            with attributes_kept(model, buffers="all"):
                if _whatever_went_before(tables, call, given, longer, other):
                    return tables
        except Exception:  # a forward that takes the other sign of a missing table
            continue
    return None


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _tables(model: Module, found: dict[str, tuple[Contents, Any, list[Any]]], absent: Any) -> Tables:
    buffers = {id(module._buffers): module for module in model.modules()}
    dictionaries = {id(h.contents): h.hangs_on for h in _holders(model, "") if h.hangs_on is not None}
    places: list[tuple[Contents, Any, Any]] = []
    registered = set()
    for holder, key, values in found.values():
        if id(holder) in buffers:
            module = buffers[id(holder)]
            registered.add((id(module), key))
            places += [(holder, key, ABSENT), (vars(module), key, _missing(values, absent))]
        elif id(holder) in dictionaries:
            places.append((*dictionaries[id(holder)], BY_SIZE))
        else:
            places.append((holder, key, _missing(values, absent)))
    return Tables(tuple(sorted(found)), tuple(places), frozenset(registered))


def _whatever_went_before(
    tables: Tables, call: Callable[[Any], Sequence[torch.Tensor]], given: Any, longer: Any, other: Any
) -> bool:
    wanted = []
    for one in (longer, given):
        with tables.missing():
            wanted.append(list(call(one)))
    for history, one, expected in (
        ((given,), given, wanted[1]), ((given,), longer, wanted[0]), ((longer,), given, wanted[1]), ((other,), given, wanted[1]),
        ((longer, given, other), longer, wanted[0]),
    ):  # fmt: skip
        with tables.missing():
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
    if any(isinstance(item, torch.Tensor) for value in values for item in _items(value)):
        return absent
    return -1 if isinstance(values[0], int) and not isinstance(values[0], bool) else values[0]


@dataclass(frozen=True)
class _Holder:
    """Where attributes are held: contents by key, but for those that are skipped.

    hangs_on: for a dictionary that is an attribute, where it is held itself.
    """

    path: str
    contents: Contents
    skipped: frozenset[str] = OWN
    hangs_on: tuple[Contents, str] | None = None

    def name(self, key: Any) -> str:
        """The dotted name of what a key holds; of a dictionary its own."""
        return self.path if self.hangs_on else f"{self.path}.{key}".lstrip(".")


def _holders(model: Module, buffers: str) -> Iterator[_Holder]:
    for path, module in model.named_modules():
        attributes = _Holder(path, vars(module))
        yield attributes
        if buffers:
            passing: set[str] = module._non_persistent_buffers_set if buffers == "all" else set()
            kept = frozenset(n for n, x in module._buffers.items() if x is not None and n not in passing)
            yield _Holder(path, module._buffers, kept)
        for name, value in _plain(attributes).items():
            if type(value) is dict:
                yield _Holder(attributes.name(name), value, frozenset(), (vars(module), name))
            elif hasattr(value, "__dict__") and not isinstance(
                value, (*PLAIN, *KEPT, type, list, tuple, dict, set, frozenset)
            ):
                yield _Holder(attributes.name(name), value.__dict__)


def _plain(holder: _Holder) -> Contents:
    return {key: value for key, value in holder.contents.items() if not holder.skipped or key not in holder.skipped}


def _set(holder: Contents, key: Any, value: Any) -> None:
    if value is ABSENT:
        holder.pop(key, None)
    else:
        holder[key] = value
