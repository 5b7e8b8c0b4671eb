"""Lift an exported program into a GraphModule on the model's own parameters."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from subquad.capture_guards import guards_of
from subquad.capture_tables import data_behind
from subquad.captured import Capture, ProgramModule
from subquad.functional_graph import functional_program, holds_modes
from subquad.ir.errors import CaptureError
from subquad.ir.graph import attribute, hang, source_of
from subquad.passes.canonicalize.flex_attention import flex_written_out
from subquad.passes.canonicalize.functional import functional
from subquad.passes.canonicalize.plain import made_plain
from subquad.passes.canonicalize.regions import inlined
from subquad.passes.canonicalize.torch_layers import layers_written_out

CONSTANTS = "_subquad_constants"
"""Attribute of a lifted graph that holds constants of the program that are no parameter of the model."""


def from_exported_program(
    program: ExportedProgram,
    root: torch.nn.Module | None,
    example_inputs: Any = None,
    expected: tuple[Any, ...] | None = None,
    tables: tuple[str, ...] = (),
) -> Capture:
    """Lift an exported program into a GraphModule whose attributes are the root's own parameters and buffers.

    program: torch.export's result.  root: the module it came from; None makes a module tree from the program's state.
    expected: where the forward read values out of tensors, what the example had there; the tensors are the program's last
    outputs, beside the forward's own.  tables: names of the attributes whose new content follows behind these.
    Raises CaptureError where that content depends on more of the inputs than their sizes.
    """
    if root is None or holds_modes(program.graph_module):
        program = functional_program(program)
    signature = program.graph_signature
    owner = root if root is not None else _module_tree(program)
    holder = torch.nn.Module()
    graph = torch.fx.Graph()
    environment: dict[torch.fx.Node, Any] = {}
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    inputs: list[str] = []
    constants: dict[str, Any] = {}
    regions: dict[torch.fx.Node, torch.fx.GraphModule] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                new = graph.create_node("get_attr", str(spec.target), name=node.name)
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                name = f"c{len(holder._buffers)}"
                holder.register_buffer(name, program.constants[str(spec.target)])
                new = graph.create_node("get_attr", f"{CONSTANTS}.{name}", name=node.name)
            elif isinstance(node.meta.get("val"), torch.Tensor | torch.SymInt):
                inputs.append(node.name)
                new = graph.placeholder(node.name)
            else:
                constants[node.name] = node.meta.get("val")
                continue
            new.meta = dict(node.meta)
            environment[node] = new
        elif node.op == "output":
            kept = _written_back(program, node.args[0], environment, graph)
            graph.output(tuple(environment[n] if isinstance(n, torch.fx.Node) else n for n in kept))
        elif node.op == "get_attr" and isinstance(getattr(program.graph_module, node.target), torch.fx.GraphModule):
            regions[node] = getattr(program.graph_module, node.target)
        else:
            _keep_regions(node, graph, environment, regions, holder)
            _copy(node, graph, environment, regions)
    attributes = torch.nn.Module()
    _adopt(attributes, owner, graph)
    if holder._buffers or holder._modules:
        attributes.add_module(CONSTANTS, holder)
    module = torch.fx.GraphModule(attributes, graph)
    args, kwargs = example_inputs if example_inputs is not None else program.example_inputs or ((), {})
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    example = dict(zip(inputs, tensors, strict=False))
    try:
        module = functional(layers_written_out(inlined(flex_written_out(module), training=False)))
    except CaptureError as refused:
        plain = functional_program(program)
        if plain is program:
            raise refused
        return from_exported_program(plain, root, example_inputs, expected, tables)
    guards = guards_of(program, tuple(inputs))
    out_spec = program.call_spec.out_spec
    for name, made in zip(tables, module.graph.output_node().args[0][-len(tables) :], strict=False):
        if read := data_behind([made]):
            raise CaptureError(
                f"`{name}` keeps what is computed from `{read}`, and a later call may read it; return it, or register a buffer."
            )
    if tables:
        _split_off(module, len(tables))
    if expected is not None:
        guards = replace(guards, values=_split_off(module, len(expected)), expected=expected)
    if tables or expected is not None:
        out_spec = None if out_spec is None else out_spec.child(0)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            # decomposition makes views that hold for the example's strides only
            node.target = torch.ops.aten.reshape.default
    made_plain(module)
    result = Capture(module, owner, tuple(inputs), "aten", example, constants, out_spec, guards=guards)
    if isinstance(owner, ProgramModule):
        owner.__dict__["_subquad_program"] = result
    return result


def _split_off(module: torch.fx.GraphModule, count: int) -> torch.fx.GraphModule:
    """A graph from the same inputs to the last `count` outputs, which the module itself no longer has."""
    graph = torch.fx.Graph()
    outputs = graph.graph_copy(module.graph, {})
    graph.output(outputs[len(outputs) - count :])
    own = module.graph.output_node()
    own.args = (own.args[0][: len(outputs) - count],)
    split = torch.fx.GraphModule(module, graph)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    split.recompile()
    return split


MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def _written_back(
    program: ExportedProgram, outputs: tuple[Any, ...], environment: dict[torch.fx.Node, Any], graph: torch.fx.Graph
) -> list[Any]:
    """The user's own outputs; the new contents of buffers, parameters and inputs among the outputs are copied into them."""
    signature = program.graph_signature
    inputs = {spec.target: spec.arg.name for spec in signature.input_specs if spec.target is not None}
    named = {node.name: node for node in program.graph.nodes}
    kept = []
    for spec, value in zip(signature.output_specs, outputs, strict=True):
        if spec.kind in MUTATIONS:
            held = environment[named[inputs.get(spec.target, spec.target)]]
            written = graph.call_function(torch.ops.aten.copy_.default, (held, environment[value]))
            written.meta = dict(environment[value].meta)
        elif spec.kind == OutputKind.USER_OUTPUT:
            kept.append(value)
    return kept


def _keep_regions(
    node: torch.fx.Node,
    graph: torch.fx.Graph,
    environment: dict[torch.fx.Node, Any],
    regions: dict[torch.fx.Node, torch.fx.GraphModule],
    holder: torch.nn.Module,
) -> None:
    """Carry over the graphs that a higher-order operator takes as arguments, as FlexAttention takes its functions."""
    for region in node.all_input_nodes:
        if region in regions and region not in environment and not _is_transparent(node):
            holder.add_module(str(region.target), regions[region])
            environment[region] = graph.get_attr(f"{CONSTANTS}.{region.target}")


def _copy(
    node: torch.fx.Node,
    graph: torch.fx.Graph,
    environment: dict[torch.fx.Node, Any],
    regions: dict[torch.fx.Node, torch.fx.GraphModule],
) -> None:
    """Copy one operation; the region of a no_grad block, or of a disabled autocast, is copied in its place."""
    inner = next((a for a in node.args if isinstance(a, torch.fx.Node) and a in regions), None)
    if inner is not None and _is_transparent(node):
        region = regions[inner].graph
        values = [environment[a] for a in node.args if isinstance(a, torch.fx.Node) and a is not inner]
        environment.update(zip((n for n in region.nodes if n.op == "placeholder"), values, strict=True))
        for step in region.nodes:
            if step.op == "output":
                environment[node] = torch.fx.node.map_arg(step.args[0], lambda n: environment[n])
            elif step.op != "placeholder":
                _copy(step, graph, environment, regions)
        return
    if node.target is operator.getitem and isinstance(environment[node.args[0]], tuple | list):
        environment[node] = environment[node.args[0]][node.args[1]]
        return
    copied = environment[node] = graph.node_copy(node, lambda n: environment[n])
    copied.meta = dict(node.meta)
    if copied.target is torch.ops.aten.detach_.default:
        copied.target = torch.ops.aten.detach.default


def _is_transparent(node: torch.fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_autocast" and node.args[2]:
        raise CaptureError(
            f"an autocast region at {source_of(node) or 'an unknown line'} changes dtypes inside the graph; "
            "convert the model to that dtype instead."
        )
    return name in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _adopt(target: torch.nn.Module, owner: torch.nn.Module, graph: torch.fx.Graph) -> None:
    """Hang the owner's parameters and buffers that the graph reads under the same dotted names, as the same objects."""
    for node in graph.nodes:
        if node.op == "get_attr" and not node.target.startswith(CONSTANTS):
            hang(target, node.target, attribute(owner, node.target))


def _module_tree(program: ExportedProgram) -> ProgramModule:
    root = ProgramModule()
    tensors: dict[str, Any] = dict(program.state_dict)
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.BUFFER and spec.target is not None and spec.target not in tensors:
            tensors[spec.target] = program.constants[spec.target]
    for name, value in tensors.items():
        hang(root, name, value, persistent=name in program.state_dict)
    return root
