"""Turn a model into one fx graph with symbolic sizes that shares the model's own parameters."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from subquad.capture_guards import fixed_size
from subquad.capture_inputs import arguments_of, batch_of_two, default_inputs, grown, symbolic_axes, with_lists
from subquad.capture_objects import Objects, objects_among, tensors_of
from subquad.capture_outputs import adapted_forward
from subquad.capture_patches import capturable
from subquad.capture_tables import AssignedAttributes, Tables, attributes_kept, fills_buffers, keeps_tensors, tables_of
from subquad.capture_values import ValueReads, branches_on_values
from subquad.captured import Capture, ProgramModule, ordered_inputs
from subquad.ir.errors import CaptureError, first_line
from subquad.ir.graph import shape_of
from subquad.lifting import from_exported_program
from subquad.redrawn_inputs import redrawn
from subquad.traced_graph import from_symbolic_trace

__all__ = ["Capture", "ProgramModule", "capture", "default_inputs", "ordered_inputs"]


def capture(model: torch.nn.Module | ExportedProgram, example_inputs: Any = None) -> Capture:
    """Capture a module, an exported program, or an fx graph.

    model: nn.Module (captured by torch.export, non-strict, no_grad), torch.fx.GraphModule made by symbolic_trace (taken
    as it is), or ExportedProgram.  example_inputs: tuple of positional or dict of keyword arguments; for a Hugging Face
    model None makes inputs of its kind.  Batch and sequence axes become symbolic where the forward allows it; where it does
    not, and where it branches on the content of a tensor, the capture's notes say so and its guards hold the condition.
    Raises CaptureError, naming the line of user code, when the forward cannot be captured.
    """
    if isinstance(model, ExportedProgram):
        return from_exported_program(model, None, None if example_inputs is None else arguments_of(example_inputs))
    traced = isinstance(model, torch.fx.GraphModule)
    if example_inputs is None and traced:
        raise CaptureError("a graph from symbolic_trace carries no sizes; give example_inputs.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{getattr(model, 'original_name', type(model).__name__)} is a TorchScript module, whose forward is compiled; "
            "give the nn.Module that it was made from, or a module that calls it."
        )
    args, kwargs = arguments_of(default_inputs(model) if example_inputs is None else example_inputs)
    objects = Objects() if traced else objects_among(model.forward, args, kwargs)
    args, kwargs = objects.as_tensors(*objects.copied(args, kwargs))
    args, kwargs = pytree.tree_map_only(torch.Tensor, batch_of_two(args, kwargs), (args, kwargs))
    if _drops_out(model):
        raise CaptureError(
            f"{type(model).__name__} is in training mode with dropout, which no rewrite can keep exact; call model.eval() first."
        )
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), capturable() as nested:
        if isinstance(model, torch.fx.GraphModule):
            try:
                return from_symbolic_trace(model, args, kwargs, symbolic_axes((args, kwargs)))
            except CaptureError:
                raise
            except Exception as error:
                raise CaptureError(_capture_message(model, error)) from error
        found = _Exporting(model, args, kwargs, objects).captured()
        found.guards = replace(found.guards, inference=nested.met)
        return found


@dataclass
class _Exporting:
    """One forward with its example arguments, on its way through torch.export.

    kwargs without a tensor are bound, not passed, so that export never sees them; objects are lists of their tensors.
    tables: plain attributes that the forward fills for the sizes at hand, once they were looked for.
    """

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    objects: Objects
    tables: Tables | None = None
    looked: bool = False

    def captured(self) -> Capture:
        """The capture of the forward; where it holds for some lengths only, tables that the modules keep are looked for."""
        found = None
        if not keeps_tensors(self.model):
            with contextlib.suppress(AssignedAttributes):
                found = self._captured()
            bounded = found is not None and (found.guards.conditions or found.notes)
            if found is not None and not (bounded and fills_buffers(self.model)):
                return found
        tables = self._tables()
        if found is not None and tables is None:
            return found
        self.tables, self.looked = tables, True
        try:
            return self._captured()
        except CaptureError:
            if found is None:
                raise
            return found

    def _captured(self) -> Capture:
        """The capture with as many symbolic axes as the forward allows, on its own or with the values it branches on."""
        first: Exception | None = None
        for reads in self._readings():
            for axes, given_up in ((2, ""), (1, "all axes but the first"), (0, "all axes")):
                try:
                    capture = self._attempt(axes, reads)
                except CaptureError:
                    raise
                except AssignedAttributes as error:
                    if not self.looked:
                        raise
                    first = first or error
                    break
                except Exception as error:
                    first = first or error
                    if branches_on_values(error):
                        break
                    continue
                if axes == 2:
                    return self._channels_first(capture, reads) or capture
                if given_up:
                    capture.notes.append(f"{given_up} are fixed at the example's sizes: {_reason(first)}.")
                return capture
        assert first is not None
        raise CaptureError(_capture_message(self.model, first)) from first

    def _readings(self) -> Iterator[ValueReads | None]:
        """Nothing at first; then, for a forward that reads values, which a graph does not have, those of the example."""
        yield None
        reads = ValueReads()
        with attributes_kept(self.model), reads, contextlib.suppress(Exception):  # the capture has raised it before
            self._run((self.args, self.kwargs))
        if reads.known:
            yield reads

    def _tables(self) -> Tables | None:
        """The plain attributes that depend on sizes alone, found by calls of other sizes and with other content."""
        given = self.args, self.kwargs
        longer = grown(given, symbolic_axes(given))
        leaves, structure = pytree.tree_flatten(given)
        tensors = {str(n): leaf for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        drawn = redrawn(tensors, 1)
        other = pytree.tree_unflatten([drawn.get(str(n), leaf) for n, leaf in enumerate(leaves)], structure)
        return None if longer is None else tables_of(self.model, self._run, given, longer, other)

    def _run(self, given: Any) -> list[torch.Tensor]:
        """The floating outputs of the forward itself for the given arguments, which it leaves as they are, as the buffers."""
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        args, kwargs = self.objects.restored(*pytree.tree_map_only(torch.Tensor, torch.clone, given))
        try:
            with torch.random.fork_rng(devices=[]):
                return [x for x in tensors_of(self.model(*args, **kwargs)) if x.is_floating_point()]
        finally:
            for buffer, value in kept:
                buffer.copy_(value)

    def _channels_first(self, capture: Capture, reads: ValueReads | None) -> Capture | None:
        """The capture with another last axis for inputs whose second one the forward fixed, [B, C, T]; None when that fails."""
        shapes = [shape_of(node) or () for node in capture.graph.graph.nodes if node.op == "placeholder"]
        tensors = _tensors((self.args, self.kwargs))
        turned = [
            n
            for n, (x, shape) in enumerate(zip(tensors, shapes, strict=False))
            if x.dim() == 3 and x.is_floating_point() and x.shape[1] > 1 and fixed_size(shape[1]) and x.shape[2] > 1
        ]
        if not turned:
            return None
        try:
            other = self._attempt(2, reads, frozenset(turned))
        except Exception:  # as it was then: the second axes fixed
            return None
        found = [shape_of(node) or () for node in other.graph.graph.nodes if node.op == "placeholder"]
        if any(fixed_size(found[n][2]) is not None for n in turned):
            return None
        other.notes[:0] = [note for note in capture.notes if note not in other.notes]
        return other

    def _attempt(self, axes: int, reads: ValueReads | None, channels_first: frozenset[int] = frozenset()) -> Capture:
        bound = {key: value for key, value in self.kwargs.items() if not _tensors(value)}
        given = self.args, {key: value for key, value in self.kwargs.items() if key not in bound}
        shapes = self.objects.batch_and_length(*symbolic_axes(given, axes, channels_first))
        answering = contextlib.nullcontext() if reads is None else reads.capture()
        adapting = adapted_forward(self.model, bound, shapes, reads, self.objects, self.tables)
        with attributes_kept(self.model), adapting as adapted, answering:
            program = torch.export.export(
                self.model, *given, dynamic_shapes=_by_name(self.model, with_lists(shapes)) or None, strict=False
            )
        expected = None if reads is None else tuple(value for _, value in reads.answered)
        capture = from_exported_program(program, self.model, given, expected, adapted.tables)
        capture.constants |= bound
        capture.arguments, capture.objects = (self.args, self.kwargs), self.objects
        capture.notes += _fixed_axes(capture, shapes, given)
        if adapted.classes:
            names = ", ".join(sorted(adapted.classes))
            capture.notes.append(f"the output holds {names}, rebuilt at every call from the tensors in it.")
        if adapted.tables:
            names = ", ".join(f"`{name}`" for name in dict.fromkeys(adapted.tables))
            capture.notes.append(
                f"what the forward keeps in {names} depends on sizes alone; the graph makes it at every call and keeps nothing."
            )
        if reads is not None:
            lines = ", ".join(dict.fromkeys(reads.lines))
            capture.notes.append(
                f"the forward reads the content of tensors ({lines}); the graph holds where it is what the example had, "
                "and other calls run the original forward."
            )
        return capture


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _fixed_axes(capture: Capture, shapes: Any, given: Any) -> list[str]:
    """A sentence for each axis that was to be symbolic and that the forward fixed."""
    leaves, structure = pytree.tree_flatten(given)
    wanted = [
        a for a, leaf in zip(structure.flatten_up_to(shapes), leaves, strict=True) if isinstance(leaf, torch.Tensor)
    ]
    placeholders = [node for node in capture.graph.graph.nodes if node.op == "placeholder"]
    notes = []
    for node, axes in zip(placeholders, wanted, strict=False):
        shape = shape_of(node) or ()
        fixed = [axis for axis in axes or () if fixed_size(shape[axis]) is not None]
        notes += [f"`{node.name}` is fixed at size {shape[axis]} along axis {axis}." for axis in fixed]
    return notes


def _reason(error: Exception | None) -> str:
    return first_line(error) if error is not None else "torch.export refuses them"


def _by_name(model: torch.nn.Module, dynamic: Any) -> dict[str, Any]:
    args, kwargs = dynamic
    named: dict[str, Any] = {}
    positional = iter(args)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            rest = tuple(positional)
            if rest:
                named[name] = rest
        elif name in kwargs:
            named[name] = kwargs[name]
        else:
            try:
                named[name] = next(positional)
            except StopIteration:
                continue
    return named


def _drops_out(model: torch.nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in model.modules())


def _capture_message(model: torch.nn.Module, error: Exception) -> str:
    library = (torch.__path__[0], os.path.dirname(__file__))
    user = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(library)]
    where = f" at {user[-1].filename}:{user[-1].lineno} (`{user[-1].line}`)" if user else ""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"the forward of {type(model).__name__} cannot be captured{where}: {first[:300]}"
