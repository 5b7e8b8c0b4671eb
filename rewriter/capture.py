"""Turn a model into one fx graph with symbolic sizes that shares the model's own parameters."""

from __future__ import annotations

import contextlib
import inspect
import io
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from subquad.ir.errors import CaptureError
from subquad.ir.graph import attribute, hang

CONSTANTS = "_subquad_constants"


@dataclass
class Capture:
    """A captured forward.

    graph: GraphModule whose parameters and buffers are the root's own objects; placeholders are the tensor inputs.
    root: the user's module (for a .pt2 program, a module tree made from its state).  inputs: placeholder names in order,
    which are the forward's argument names.  constants: non-tensor arguments the graph was captured with.
    out_spec: pytree of the original's output; the graph returns its leaves as a tuple.
    dialect: "aten" (torch.export) or "torch" (Dynamo, symbolic_trace).  example: the tensors captured with.
    """

    graph: torch.fx.GraphModule
    root: torch.nn.Module
    inputs: tuple[str, ...]
    dialect: str
    example: dict[str, torch.Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    out_spec: pytree.TreeSpec | None = None
    known_tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def capture(model: torch.nn.Module | ExportedProgram, example_inputs: Any = None) -> Capture:
    """Capture a module, an exported program, or an fx graph.

    model: nn.Module (captured by torch.export, non-strict, no_grad), torch.fx.GraphModule made by symbolic_trace (taken
    as it is), or ExportedProgram.  example_inputs: tuple of positional or dict of keyword arguments; for a Hugging Face
    model None makes token ids and a padding mask.  Batch and sequence axes become symbolic.
    Raises CaptureError, naming the line of user code, when the forward cannot be captured.
    """
    if isinstance(model, ExportedProgram):
        return from_exported_program(model, None, example_inputs)
    if isinstance(model, torch.fx.GraphModule):
        return from_symbolic_trace(model, example_inputs)
    if example_inputs is None:
        example_inputs = default_inputs(model)
    args, kwargs = _arguments(example_inputs)
    args, kwargs = pytree.tree_map_only(torch.Tensor, _widened(args, kwargs), (args, kwargs))
    if _drops_out(model):
        raise CaptureError(
            f"{type(model).__name__} is in training mode with dropout, which no rewrite can keep exact; call model.eval() first."
        )
    dynamic = pytree.tree_map(_dynamic_axes, (args, kwargs))
    try:
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
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


def from_exported_program(
    program: ExportedProgram, root: torch.nn.Module | None, example_inputs: Any = None
) -> Capture:
    """Lift an exported program into a GraphModule whose attributes are the root's own parameters and buffers.

    program: torch.export's result.  root: the module it came from; None makes a module tree from the program's state.
    """
    signature = program.graph_signature
    owner = root if root is not None else _module_tree(program)
    holder = torch.nn.Module()
    graph = torch.fx.Graph()
    environment: dict[torch.fx.Node, Any] = {}
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    inputs: list[str] = []
    constants: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                new = graph.create_node("get_attr", str(spec.target), name=node.name)
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                name = f"c{len(holder._buffers)}"
                holder.register_buffer(name, program.constants[str(spec.target)])
                new = graph.create_node("get_attr", f"{CONSTANTS}.{name}", name=node.name)
            elif isinstance(node.meta.get("val"), (torch.Tensor, torch.SymInt)):
                inputs.append(node.name)
                new = graph.placeholder(node.name)
            else:
                constants[node.name] = node.meta.get("val")
                continue
            new.meta = dict(node.meta)
            environment[node] = new
        elif node.op == "output":
            keep = {spec.arg.name for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"}
            values = [environment[n] if isinstance(n, torch.fx.Node) else n for n in node.args[0]]
            kept = tuple(
                v
                for v, n in zip(values, node.args[0], strict=True)
                if not isinstance(n, torch.fx.Node) or n.name in keep
            )
            graph.output(kept)
        else:
            environment[node] = graph.node_copy(node, lambda n: environment[n])
            environment[node].meta = dict(node.meta)
    attributes = torch.nn.Module()
    _adopt(attributes, owner, graph)
    if holder._buffers:
        attributes.add_module(CONSTANTS, holder)
    module = torch.fx.GraphModule(attributes, graph)
    args, kwargs = _arguments(example_inputs) if example_inputs is not None else program.example_inputs or ((), {})
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    example = dict(zip(inputs, tensors, strict=False))
    return Capture(module, owner, tuple(inputs), "aten", example, constants, program.call_spec.out_spec)


def _adopt(target: torch.nn.Module, owner: torch.nn.Module, graph: torch.fx.Graph) -> None:
    """Hang the owner's parameters and buffers that the graph reads under the same dotted names, as the same objects."""
    for node in graph.nodes:
        if node.op == "get_attr" and not node.target.startswith(CONSTANTS):
            hang(target, node.target, attribute(owner, node.target))


def _module_tree(program: ExportedProgram) -> torch.nn.Module:
    root = torch.nn.Module()
    tensors: dict[str, Any] = dict(program.state_dict)
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.BUFFER and spec.target is not None and spec.target not in tensors:
            tensors[spec.target] = program.constants[spec.target]
    for name, value in tensors.items():
        hang(root, name, value)
    return root


def from_symbolic_trace(module: torch.fx.GraphModule, example_inputs: Any) -> Capture:
    """Take an fx graph as it is and record fake values with symbolic sizes on its nodes.

    module: what torch.fx.symbolic_trace returned.  example_inputs: the tensors it takes (needed for dtypes and sizes).
    """
    if example_inputs is None:
        raise CaptureError("a graph from symbolic_trace carries no sizes; give example_inputs.")
    args, kwargs = _arguments(example_inputs)
    args, kwargs = pytree.tree_map_only(torch.Tensor, _widened(args, kwargs), (args, kwargs))
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    values = dict(zip(names, args, strict=False)) | kwargs
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbolic = torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC
    static = torch.fx.experimental.symbolic_shapes.DimDynamic.STATIC
    sizes: dict[int, Any] = {}
    fakes: list[Any] = []
    for name in names:
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            context: Any = torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext(
                dynamic_sizes=[symbolic if axis < 2 else static for axis in range(value.dim())]
            )
            duck = mode.from_tensor(value, symbolic_context=context)
            fakes.append(duck)
            sizes.update(dict(enumerate(duck.shape)))
        else:
            fakes.append(value)
    try:
        _RecordValues(module, mode).run(*fakes)
    except Exception as error:
        raise CaptureError(_capture_message(module, error)) from error
    example = {str(n): v for n, v in values.items() if isinstance(v, torch.Tensor)}
    inputs = tuple(str(n) for n in names if isinstance(values.get(n), torch.Tensor))
    constants = {str(n): values.get(n) for n in names if str(n) not in inputs}
    return Capture(module, module, inputs, "torch", example, constants)


class _RecordValues(torch.fx.Interpreter):
    """Runs a graph on fake tensors and keeps each value in the node's meta."""

    def __init__(self, module: torch.fx.GraphModule, mode: Any) -> None:
        super().__init__(module)
        self.mode = mode

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node and record its fake value."""
        with self.mode, torch.no_grad():
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and not isinstance(value, torch._subclasses.FakeTensor):
                value = self.mode.from_tensor(value)
        n.meta["val"] = value
        return value
