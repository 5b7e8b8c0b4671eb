"""How many attentions Inductor's own patterns fuse in a model: its joint-graph passes alone, nothing is compiled."""

from __future__ import annotations

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


def fused_by_inductor(model: nn.Module, inputs: dict[str, Any]) -> int:
    """The counter `fuse_attention` after Inductor's pattern matcher has seen every graph of the model's forward."""
    torch._dynamo.reset()
    counters.clear()
    backend = aot_autograd(fw_compiler=_fuse, inference_compiler=_fuse, decompositions=select_decomp_table())
    try:
        with torch.no_grad():
            call(torch.compile(model, backend=backend), inputs)
        return int(counters["inductor"]["fuse_attention"])
    finally:
        torch._dynamo.reset()
