"""What deriving a decoder from a model gives: the graph of a step, the graph of a prefill, and the layout around them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.fx

from subquad.runtime.layout import DecoderLayout

STREAM = "stream"
"""Key in a node's meta: the value is [batch, tokens, ...] and the graph may be cut behind it."""
PROMPT_INPUTS = ("columns",)
STEP_INPUTS = ("columns", "rows", "places", "queries", "keys", "tree", "real")
SHARED_INPUTS = (*STEP_INPUTS, "nodes", "slots")
WRITES = (torch.ops.aten.index_copy_.default, torch.ops.aten.index_put_.default)
"""The operations by which a graph writes to buffers."""


def copied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The module with a graph of its own, marks of the stream included."""
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return torch.fx.GraphModule(module, graph)


def sweep(graph: torch.fx.Graph) -> None:
    """Remove what nothing reads and what writes nothing."""
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or n.target in WRITES)


@dataclass
class StepGraph:
    """The graphs that decode a model; the parameters are the model's own objects.

    first: GraphModule of prompts [B, T] before which nothing came.  Placeholders: token inputs by their names, `columns`
    int64 [T] (0 .. T-1), `table_i` (history outputs over all columns), `past_i` (running sums at the columns), and per site
    i `k_i`, `v_i` (buffers [B, capacity, heads, dim]), or `state_i`, `window_k_i`, `window_v_i`, `seen_i`.
    step: GraphModule of w more tokens of each of B rows that may differ in length.  Outside attention rows and tokens are
    alike, so that the graph runs on one row of N = B * w tokens: token inputs [1, N], `columns` int64 [N] (the place of a
    token in its row, which is its position), `rows` and `places` int64 [N] (where its key and value go), `queries` int64
    [B, w] (the columns by row), `keys` int64 [B, S] (the column that each slot holds), `tree` bool [B, w, S] (the slots that
    come before a token, itself included), `real` bool [B, w] (False for a token that recurrent states shall not see), tables,
    pasts [1, N] and states as above.
    shared: the same step for rows that share keys; empty when they cannot.  "joined": keys and values are those of shared nodes
    and the row's own; beside the above, `nodes` int64 [n, 5] (see kernels.prefix_attention), `slots` int64 [slots] (the column
    that each slot of the nodes holds) and per softmax site i `shared_k_i`, `shared_v_i` [slots, heads, dim]; rows with padding
    have no nodes.  "branch": the rows have no keys of their own yet, and no padding.
    All return the logits [B, T or 1, N, vocabulary] and the new recurrent states; buffers are written in place.
    """

    step: torch.fx.GraphModule
    first: torch.fx.GraphModule
    layout: DecoderLayout
    shared: dict[str, torch.fx.GraphModule] = field(default_factory=dict)
