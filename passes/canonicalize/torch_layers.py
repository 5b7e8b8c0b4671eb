"""Write the attention that torch keeps as one operation out as its parts: nn.MultiheadAttention and the fused encoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch.fx.traceback import get_current_meta

from subquad.ir.errors import first_line
from subquad.passes.canonicalize.retrace import retrace

Node = torch.fx.Node
aten = torch.ops.aten
KEPT = "subquad_kept"
"""The key of the reason in the meta of a layer that stays."""


def layers_written_out(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same computation with every attention layer written out that can be; itself when there is none.

    module: a graph with recorded values.  What torch does not trace stays, with the reason in its meta.
    """
    if not any(is_layer(node) for node in module.graph.nodes):
        return module
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = torch.fx.GraphModule(module, graph)
    for node in [node for node in graph.nodes if is_layer(node)]:
        try:
            retrace(copied, [node], composite=True, instead=lambda target: WRITTEN_OUT.get(target, target))
        except Exception as error:
            node.meta[KEPT] = first_line(error)
    copied.recompile()
    return copied


def is_layer(node: Node) -> bool:
    """True for a call of an attention layer as one operation."""
    return node.op == "call_function" and node.target in WRITTEN_OUT


def native_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """torch._native_multi_head_attention on batch-first [B, T, D]; where the mask is not zero a key is hidden.

    mask: [Tq, Tk] for mask_type 0, [B, Tk] for 1, one that broadcasts with [B, H, Tq, Tk] for 2.
    """
    projected = (
        F.linear(x, weight, bias)
        for x, weight, bias in zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    )
    q, k, v = (x.unflatten(-1, (num_heads, embed_dim // num_heads)).transpose(1, 2) for x in projected)
    scores = q @ k.transpose(-1, -2) * (embed_dim // num_heads) ** -0.5
    if mask is not None:
        hidden = mask.to(torch.bool)
        scores = scores.masked_fill(hidden[:, None, None, :] if mask_type == 1 else hidden, float("-inf"))
    weights = torch.softmax(scores, -1)
    out = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """torch._transformer_encoder_layer_fwd on batch-first [B, T, D]."""

    def attended(x: torch.Tensor) -> torch.Tensor:
        given = (embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type)
        with _inside("self_attn"):
            return native_attention(x, x, x, *given)[0]

    def widened(x: torch.Tensor) -> torch.Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def norm_1(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attended(norm_1(src))
        return src + widened(norm_2(src))
    src = norm_1(src + attended(src))
    return norm_2(src + widened(src))


@contextmanager
def _inside(name: str) -> Iterator[None]:
    """Operations traced in the block belong to this module of the one whose operation is written out."""
    meta = get_current_meta()
    stack = meta.get("nn_module_stack")
    if stack:
        path = next(reversed(stack.values()))[0]
        meta["nn_module_stack"] = stack | {name: (f"{path}.{name}", torch.nn.MultiheadAttention)}
    yield
    meta["nn_module_stack"] = stack


WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    torch._native_multi_head_attention: native_attention,
    aten._native_multi_head_attention.default: native_attention,
    torch._transformer_encoder_layer_fwd: encoder_layer,
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
}
"""What each of the operations is, in functions that have parts."""
