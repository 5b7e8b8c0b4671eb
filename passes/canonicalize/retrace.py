"""Replace operations of a graph by the ATen operations that they run, traced on the fake values recorded at capture."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch._decomp import get_decompositions
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.fx.traceback import preserve_node_meta, set_current_meta
from torch.utils import _pytree as pytree

from subquad.ir.graph import attribute, hang, value_of

Node = torch.fx.Node
FUSED = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu]
"""Kernels that SDPA becomes where it is not kept whole; as matrix products and a softmax they are read like any other."""
HELD = "_subquad_traced"
"""Prefix of the attributes that hold constants made while tracing."""


def retrace(
    module: torch.fx.GraphModule,
    nodes: Sequence[Node],
    composite: bool,
    instead: Callable[[Any], Any] = lambda target: target,
) -> None:
    """Replace, in place, consecutive nodes by the operations that they run; these keep module path and line of their nodes.

    module: a graph with fake values on its nodes.  composite: keep softmax, SDPA, linear and matmul whole, which torch.vmap
    does not allow.  instead: the function to run in the place of a node's target.
    Raises what running the nodes on their fake values raises; the graph is unchanged then.
    """
    chosen = [node for node in nodes if node.op != "get_attr"]
    region = set(chosen)
    given = list(dict.fromkeys(n for node in chosen for n in node.all_input_nodes if n not in region))
    read = [node for node in chosen if any(user not in region for user in node.users)]

    def run(*values: Any) -> list[Any]:
        environment = dict(zip(given, values, strict=True))
        for node in chosen:
            args, kwargs = map_arg((node.args, node.kwargs), environment.__getitem__)
            with set_current_meta(node):
                environment[node] = _called(module, node, instead, args, kwargs)
        return [environment[node] for node in read]

    mode = tracing_mode(module)
    with mode, torch.no_grad(), preserve_node_meta():
        table: Any = None if composite else get_decompositions(FUSED)
        traced = make_fx(run, table, pre_dispatch=composite)(*(_fake(module, node, mode) for node in given))
    _splice(module, chosen[-1], given, read, traced)
    for node in reversed(chosen):
        module.graph.erase_node(node)


def tracing_mode(module: torch.fx.GraphModule) -> FakeTensorMode:
    """The mode of the fake values on a graph's nodes."""
    leaves = (leaf for node in module.graph.nodes for leaf in pytree.tree_leaves(value_of(node)))
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None) or FakeTensorMode()


def _called(
    module: torch.fx.GraphModule,
    node: Node,
    instead: Callable[[Any], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return instead(function)(*args, **kwargs)


def _fake(module: torch.fx.GraphModule, node: Node, mode: FakeTensorMode) -> Any:
    value = value_of(node)
    if value is None and node.op == "get_attr":
        value = attribute(module, str(node.target))
    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    return value


def _splice(
    module: torch.fx.GraphModule, before: Node, given: list[Node], read: list[Node], traced: torch.fx.GraphModule
) -> None:
    """Insert a traced graph, and let what read the old nodes read its results."""
    inputs = iter(given)
    made: dict[Node, Node] = {}
    with module.graph.inserting_before(before):
        for step in traced.graph.nodes:
            if step.op == "placeholder":
                made[step] = next(inputs)
            elif step.op == "get_attr":
                made[step] = module.graph.get_attr(_hung(module, attribute(traced, str(step.target))))
                made[step].meta = dict(step.meta)
            elif step.op != "output":
                made[step] = module.graph.node_copy(step, made.__getitem__)
                if step.target is torch.ops.aten.view.default:
                    # views were chosen for the example's strides
                    made[step].target = torch.ops.aten.reshape.default
    results: Any = traced.graph.output_node().args[0]
    for old, result in zip(read, results, strict=True):
        _read_instead(old, map_arg(result, made.__getitem__))


def _hung(module: torch.fx.GraphModule, value: Any) -> str:
    number = sum(name.startswith(HELD) for name in module._buffers)
    hang(module, name := f"{HELD}{number}", value, persistent=False)
    return name


def _read_instead(old: Node, result: Any) -> None:
    """Put a value, which may be a tuple of nodes, in the place of a node; parts of a tuple are read as they are."""
    for user in list(old.users):
        if user.target is operator.getitem and isinstance(result, tuple | list):
            _read_instead(user, result[operator.index(user.args[1])])  # type: ignore[arg-type]
            user.graph.erase_node(user)
        else:
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda node: result if node is old else node)
