"""Take a graph from torch.fx.symbolic_trace as a capture: fake values with symbolic sizes on every node."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from subquad.capture_guards import traced_guards
from subquad.captured import Capture
from subquad.passes.canonicalize.functional import functional
from subquad.passes.canonicalize.leaf_layers import leaf_layers_opened


def from_symbolic_trace(
    module: torch.fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> Capture:
    """Take an fx graph as it is and record fake values with symbolic sizes on its nodes.

    module: what torch.fx.symbolic_trace returned.  args, kwargs: example inputs.  dynamic: for every input a dict whose
    keys are the axes that become symbolic, or None.
    """
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    values = dict(zip(names, args, strict=False)) | kwargs
    axes = dict(zip(names, dynamic[0], strict=False)) | dynamic[1]
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Any] = []
    for name in names:
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            sizes = [DimDynamic.DYNAMIC if axis in axes[name] else DimDynamic.STATIC for axis in range(value.dim())]
            context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
            value = mode.from_tensor(value, symbolic_context=context)
        fakes.append(value)
    _RecordValues(module, mode).run(*fakes)
    inputs = tuple(name for name in names if isinstance(values.get(name), torch.Tensor))
    constants = {name: values.get(name) for name in names if name not in inputs}
    graph = functional(leaf_layers_opened(module))
    guards = traced_guards(
        mode.shape_env, {name: fake for name, fake in zip(names, fakes, strict=True) if name in inputs}
    )
    example = {name: values[name] for name in inputs}
    return Capture(graph, module, inputs, "torch", example, constants, guards=guards, arguments=(args, kwargs))


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
