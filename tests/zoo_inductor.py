"""How many attentions Inductor's own patterns fuse in a model: its joint-graph passes alone, nothing is compiled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from zoo import call


def _fuse(graph: torch.fx.GraphModule, example: Any) -> Any:
    """Inductor's passes on the forward graph of ahead-of-time autograd, in the fake mode it was traced in."""
    mode = torch._guards.detect_fake_mode(example)
    with V.set_fake_mode(mode):
        joint_graph_passes(graph)

    def run(inputs: list[Any]) -> Any:
        return graph(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def fused_in_graph(graph: torch.fx.GraphModule, example: Any) -> int:
    """The counter `fuse_attention` after Inductor's patterns have seen one of Dynamo's graphs, which stays as it is."""
    before = int(counters["inductor"]["fuse_attention"])
    backend = aot_autograd(fw_compiler=_fuse, inference_compiler=_fuse, decompositions=select_decomp_table())
    backend(copy.deepcopy(graph), example)
    return int(counters["inductor"]["fuse_attention"]) - before


def fused_by_inductor(model: nn.Module, inputs: dict[str, Any]) -> int:
    """The attentions that Inductor's patterns fuse in all graphs of the model's forward."""
    found = 0

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal found
        found += fused_in_graph(graph, example)
        return graph.forward

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            call(torch.compile(model, backend=count), inputs)
        return found
    finally:
        torch._dynamo.reset()
