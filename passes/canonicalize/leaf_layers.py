"""Open the attention layers of torch.nn that symbolic_trace keeps as leaves, on their own parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import nn

from subquad.ir.errors import CaptureError, first_line
from subquad.ir.graph import attribute
from subquad.ir.vocabulary import module_of
from subquad.passes.canonicalize.retrace import retrace, tracing_mode
from subquad.passes.canonicalize.tidy import tidy

Node = torch.fx.Node


def _opened(layer: nn.Module, names: list[str]) -> Callable[..., Any]:
    """A layer as a function of its tensors and its arguments, without the fast path that has no parts."""

    def layer_opened(tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return torch.func.functional_call(
                layer, dict(zip(names, tensors, strict=True)), args, kwargs, tie_weights=False
            )
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return layer_opened


def leaf_layers_opened(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same computation with every leaf that holds an nn.MultiheadAttention as its operations; itself without any.

    module: a graph from symbolic_trace with recorded values.
    Raises CaptureError, naming the layer, for one that cannot be traced.
    """
    if not any(_attends(node) for node in module.graph.nodes):
        return module
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = torch.fx.GraphModule(module, graph)
    for node in [node for node in graph.nodes if _attends(node)]:
        _open(copied, node)
    tidy(copied)
    return copied


def _attends(node: Node) -> bool:
    layer = module_of(node)
    return layer is not None and any(isinstance(part, nn.MultiheadAttention) for part in layer.modules())


def _open(module: torch.fx.GraphModule, node: Node) -> None:
    path, layer, mode = str(node.target), module_of(node), tracing_mode(module)
    assert layer is not None
    names = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    with module.graph.inserting_before(node):
        tensors = [module.graph.get_attr(f"{path}.{name}") for name in names]
        for tensor in tensors:
            value = attribute(module, str(tensor.target))
            tensor.meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
        called = module.graph.call_function(_opened(layer, names), (tensors, *node.args), dict(node.kwargs))
    called.meta = node.meta | {"nn_module_stack": {path: (path, type(layer))}}
    node.replace_all_uses_with(called)
    module.graph.erase_node(node)
    try:
        retrace(module, [called], composite=True)
    except Exception as error:
        raise CaptureError(
            f"`{path}` ({type(layer).__name__}), which symbolic_trace left as one call, cannot be traced: "
            f"{first_line(error)}; give the module itself instead of its graph."
        ) from error
