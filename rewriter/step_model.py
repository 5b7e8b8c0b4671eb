"""The model of a loop as something that answers its calls from a decoder: capture, every row, exact operators, derivation."""

from __future__ import annotations

import functools
import inspect
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from subquad.application import original_forward, rewritten
from subquad.bound_forward import BoundForward, own_hooks_lifted
from subquad.capture import Capture, capture
from subquad.capture_guards import fixed_size
from subquad.decoder import Decoder
from subquad.every_row import Rows, with_every_row
from subquad.incremental import decoder
from subquad.ir.errors import CaptureError
from subquad.ir.graph import value_of
from subquad.ir.report import Report
from subquad.output_place import at, filled, logits_place, without_tensors
from subquad.pass_spec import parse_passes
from subquad.recognition import recognise
from subquad.replacement import replacement, rewritten_capture
from subquad.text_generation import decoder_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""How far two orders of summation may lie apart, as a part of the largest logit."""
WORTH_COMPILING = 2**24
"""Bytes of weights from which on the decoder is compiled beside its first loop."""
SHORTEST = 8
"""Columns of the example a model is captured with: an axis of one element would be fixed at it."""


class Given(NamedTuple):
    """What one call gives a decoder.

    ids: int64 [B, T].  mask: int64 [B, T], None where the model takes none.  others: the inputs that do not grow.
    """

    ids: Tensor
    mask: Tensor | None
    others: tuple[Tensor, ...] = ()

    def copied(self) -> Given:
        """The same in memory that the caller does not write to; the others are compared by value, and not copied here."""
        return Given(self.ids.clone(), None if self.mask is None else self.mask.clone(), self.others)


@dataclass
class StepModel:
    """A causal model whose calls on ids [B, T] can be answered row by row.

    call: binds the arguments of a call to the captured inputs.  rows: which rows the forward itself returns.
    place: where the logits lie in what it returns: () for itself, an index, or an attribute's name.
    template: what one call returned, its tensors aside.  watch: the parameters as they were captured.
    """

    root: nn.Module
    decoder: Decoder
    call: BoundForward
    rows: Rows
    place: Any
    template: Any
    vocabulary: int
    dtype: torch.dtype
    watch: Watch

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The inputs of the captured graph, in order."""
        return tuple(str(n.target) for n in self.call.capture.graph.graph.find_nodes(op="placeholder"))

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Given | None, str | None]:
        """What a call gives the decoder; or None and why it is not the captured one."""
        inputs, why = self.call.bound_inputs(args, without_cache(self.root, kwargs))
        if (why := why or self.call.capture.guards.broken(inputs)) is not None:
            return None, why
        layout = self.decoder.programs.layout
        named = dict(zip(self.names, inputs, strict=True))
        tokens, others = [named[n] for n in layout.inputs], () if layout.fixed is None else layout.fixed.inputs
        return Given(tokens[0], tokens[1] if len(tokens) > 1 else None, tuple(named[n] for n in others)), None

    def compile(self) -> None:
        """Compile the decoder beside the loop, where its weights are worth it; a program is used once it is ready."""
        if sum(t.numel() * t.element_size() for t in self.root.parameters()) >= WORTH_COMPILING:
            self.decoder.compile(wait=False)

    def changed(self) -> str | None:
        """Why the decoder is no longer the model's: parameters were trained or replaced, or it was put in training mode."""
        if self.root.training and dropping(self.root):
            return "the model is in training mode with dropout"
        if not self.watch.same():
            return "the model's parameters changed since it was captured"
        return None

    def logits(self, out: Any) -> Tensor:
        """The logits in what the forward returned."""
        found = at(out, self.place)
        assert isinstance(found, Tensor)
        return found

    def last_row(self, out: Any) -> Tensor:
        """The logits [B, V] of the last token in what the forward returned."""
        found = self.logits(out)
        return found if found.dim() == 2 else found[:, -1]

    def alike(self, found: Tensor, want: Tensor) -> bool:
        """True when rows differ by no more than two roundings of such a model may: a part of the largest logit."""
        allowed = TOLERANCE[self.dtype] * max(1.0, float(want.nan_to_num(posinf=0.0, neginf=0.0).abs().max()))
        return bool(((found == want) | ((found - want).abs() <= allowed)).all())

    def returned(self, logits: Tensor, others: dict[Any, Any] | None = None) -> Any:
        """What the forward returns, with these logits, and others by their places, where they lie."""
        return filled(self.template, {self.place: logits, **(others or {})})


HELD = "_subquad_loops"
"""Instance attribute of a module that loops decode with; see `Held`."""


class Held:
    """What loops know of a module, for as long as it lives: its step models, and a record for each decorated function."""

    def __init__(self) -> None:
        self.steps: list[StepModel] = []
        self.loops: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        """A copied module starts anew."""
        return Held()

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, ()


def held(root: nn.Module) -> Held:
    """What is known of a module."""
    found = root.__dict__.setdefault(HELD, Held())
    assert isinstance(found, Held)
    return found


def step_model(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> StepModel:
    """The step model behind a module's call, which returned `out`; one that was made before is used again.

    Raises CaptureError or NotIncremental with the sentence why its calls cannot be answered row by row.
    """
    known = held(root)
    known.steps = [step for step in known.steps if step.watch.same()]
    place = logits_place(out)
    for step in known.steps:
        if step.place == place and step.bound(args, kwargs)[1] is None:
            return step
    known.steps.append(_made(root, args, kwargs, out))
    return known.steps[-1]


def _made(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> StepModel:
    place = logits_place(out)
    record = rewritten(root)
    given = without_cache(root, kwargs)
    example = _example(args, given)
    if record is not None:
        captured = applied = record.applied
    else:
        with original_forward(root), own_hooks_lifted(root):
            captured = capture(root, example)
        _any_length(captured)
        applied = _with_operators(captured)
    every, rows = with_every_row(applied)
    made = decoder_of(root) if record is not None and rows.kept == "all" else decoder(every, others=True)
    logits = at(out, place)
    return StepModel(
        root,
        made,
        BoundForward(root, captured),
        rows,
        place,
        without_tensors(out),
        int(logits.shape[-1]),
        logits.dtype,
        Watch(root),
    )


def _any_length(captured: Capture) -> None:
    """Raises CaptureError when the graph holds for one number of tokens only."""
    for node in captured.graph.graph.nodes:
        value = value_of(node) if node.op == "placeholder" else None
        if isinstance(value, Tensor) and value.dim() == 2 and fixed_size(value.shape[1]) is not None:
            notes = "; ".join(note.rstrip(".") for note in captured.notes) or f"`{node.name}` has one size"
            raise CaptureError(
                f"the forward computes with the number of tokens, so its graph holds for one number only: {notes}"
            )


def _with_operators(captured: Capture) -> Capture:
    """The capture with the exact operator at every attention site."""
    report = recognise(captured, Report())
    (fuse,) = parse_passes("fuse")
    taken = []
    for site in report.sites:
        if (refusal := fuse.admits(site)) is not None:
            raise CaptureError(f"{refusal}")
        taken.append(replacement(captured.root, site, fuse))
    return rewritten_capture(captured, tuple(taken))


def without_cache(root: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with `use_cache=False` where the forward takes it and no cache is given."""
    if "use_cache" in inspect.signature(type(root).forward).parameters and kwargs.get("past_key_values") is None:
        return {**kwargs, "use_cache": False}
    return kwargs


def _example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with tensors [B, T] and floating [B, T, D] repeated to a length that may become symbolic."""

    def long(value: Tensor) -> Tensor:
        if value.dim() != 2 + value.is_floating_point():
            return value
        repeats = [1] * value.dim()
        repeats[1] = -(-SHORTEST // value.shape[1]) if value.shape[1] else 1
        return value.repeat(repeats)[:, :SHORTEST] if value.shape[1] < SHORTEST else value.clone()

    example: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, long, (args, kwargs))
    return example


def dropping(root: nn.Module) -> bool:
    """True when some dropout layer is in training mode."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in root.modules())


Mark = tuple[int, int]
"""A mark of a tensor that changes when it is written to or replaced."""


def _mark(tensor: Tensor) -> Mark:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class Watch:
    """The parameters and buffers of a module as they are now; looking again takes microseconds, once a token."""

    def __init__(self, root: nn.Module) -> None:
        tables = [t for module in root.modules() for t in (module._parameters, module._buffers, module._modules)]
        self.tables = [(table, len(table)) for table in tables]
        self.entries = [
            (table, name, value, _mark(value) if isinstance(value, Tensor) else None)
            for table in tables
            for name, value in table.items()
        ]

    def same(self) -> bool:
        """True while none was written to, replaced, added or removed."""
        if any(len(table) != count for table, count in self.tables):
            return False
        return all(
            table.get(name) is value and (mark is None or _mark(value) == mark)  # type: ignore[arg-type]
            for table, name, value, mark in self.entries
        )
