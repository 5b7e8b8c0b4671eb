"""Turn a model into one fx graph with symbolic sizes that shares the model's own parameters."""

from __future__ import annotations

import contextlib
import inspect
import io
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from subquad.captured import Capture, ProgramModule, ordered_inputs
from subquad.ir.errors import CaptureError
from subquad.lifting import from_exported_program
from subquad.traced_graph import from_symbolic_trace

__all__ = ["Capture", "ProgramModule", "capture", "default_inputs", "ordered_inputs"]


def capture(model: torch.nn.Module | ExportedProgram, example_inputs: Any = None) -> Capture:
    """Capture a module, an exported program, or an fx graph.

    model: nn.Module (captured by torch.export, non-strict, no_grad), torch.fx.GraphModule made by symbolic_trace (taken
    as it is), or ExportedProgram.  example_inputs: tuple of positional or dict of keyword arguments; for a Hugging Face
    model None makes token ids and a padding mask.  Batch and sequence axes become symbolic.
    Raises CaptureError, naming the line of user code, when the forward cannot be captured.
    """
    if isinstance(model, ExportedProgram):
        return from_exported_program(model, None, None if example_inputs is None else _arguments(example_inputs))
    traced = isinstance(model, torch.fx.GraphModule)
    if example_inputs is None and traced:
        raise CaptureError("a graph from symbolic_trace carries no sizes; give example_inputs.")
    args, kwargs = _arguments(default_inputs(model) if example_inputs is None else example_inputs)
    args, kwargs = pytree.tree_map_only(torch.Tensor, _widened(args, kwargs), (args, kwargs))
    if _drops_out(model):
        raise CaptureError(
            f"{type(model).__name__} is in training mode with dropout, which no rewrite can keep exact; call model.eval() first."
        )
    dynamic = pytree.tree_map(_dynamic_axes, (args, kwargs))
    try:
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            if isinstance(model, torch.fx.GraphModule):
                return from_symbolic_trace(model, args, kwargs, dynamic)
            program = torch.export.export(model, args, kwargs, dynamic_shapes=_by_name(model, dynamic), strict=False)
    except Exception as error:
        raise CaptureError(_capture_message(model, error)) from error
    return from_exported_program(program, model, (args, kwargs))


def default_inputs(model: torch.nn.Module) -> dict[str, Any]:
    """Example inputs for a Hugging Face text model: ids [2, 8] and a padding mask of ones, without cache.

    Raises CaptureError for any other module, which needs example_inputs.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(getattr(config, "get_text_config", lambda: config)(), "vocab_size", None)
    if vocabulary is None:
        raise CaptureError(
            f"{type(model).__name__} needs example_inputs: a tuple or dict of the tensors its forward takes."
        )
    names = inspect.signature(model.forward).parameters
    ids = torch.arange(16).reshape(2, 8) * 7919 % vocabulary
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if (
        isinstance(example_inputs, tuple)
        and len(example_inputs) == 2
        and isinstance(example_inputs[0], tuple)
        and isinstance(example_inputs[1], dict)
    ):
        return example_inputs
    if isinstance(example_inputs, Sequence):
        return tuple(example_inputs), {}
    raise CaptureError(f"example_inputs is a {type(example_inputs).__name__}; give a tuple, a dict or a tensor.")


def _widened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch.export fixes axes of size one, so a batch of one is doubled when every tensor input has it."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    batch_of_one = bool(tensors) and all(t.dim() > 0 and t.shape[0] == 1 for t in tensors)
    return lambda t: torch.cat([t, t]) if batch_of_one else t


def _dynamic_axes(value: Any) -> Any:
    """Which axes become symbolic: batch and sequence, never heads, channels or features.

    [B], [B, T] and [B, T, D] → the first two; [B, H, T, …] and more → the first and the third, and the fourth of a mask
    [B, H, Tq, Tk] (boolean, or as wide as it is high).  Axes of size one stay fixed.
    """
    if not isinstance(value, torch.Tensor):
        return None
    axes = {0, 1} if value.dim() < 4 else {0, 2}
    if value.dim() == 4 and (value.dtype == torch.bool or value.shape[2] == value.shape[3]):
        axes.add(3)
    return {axis: Dim.AUTO for axis in axes if axis < value.dim() and value.shape[axis] != 1}


def _by_name(model: torch.nn.Module, dynamic: Any) -> dict[str, Any]:
    args, kwargs = dynamic
    named: dict[str, Any] = {}
    positional = iter(args)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            rest = tuple(positional)
            if rest:
                named[name] = rest
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            extra = {key: value for key, value in kwargs.items() if key not in named}
            if extra:
                named[name] = extra
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
    frames = traceback.extract_tb(error.__traceback__)
    torch_root = torch.__path__[0]
    user = [
        f for f in frames if not f.filename.startswith(torch_root) and "subquad" not in f.name and f.name != "capture"
    ]
    user = [f for f in user if f.filename != __file__]
    where = f" at {user[-1].filename}:{user[-1].lineno} (`{user[-1].line}`)" if user else ""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"the forward of {type(model).__name__} cannot be captured{where}: {first[:300]}"
