"""What a decoder derived from a model consists of: its graphs, its inputs, and the state of each attention site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx

STREAM = "stream"
"""Key in a node's meta: the value is [batch, tokens, ...] and the graph may be cut behind it."""


@dataclass(frozen=True)
class SiteState:
    """The state of one attention site.

    kind: "kv" (buffers [B, capacity, kv_heads, key_dim | value_dim] in `dtype`) or "recurrent" (state [B, heads, features,
    value_dim + 1] in fp32, or fp64 for fp64 models, and a window of `window` slots).
    """

    kind: str
    dtype: torch.dtype
    kv_heads: int
    key_dim: int
    value_dim: int
    heads: int = 0
    features: int = 0
    window: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The placeholders that carry the state, without the site's number."""
        return ("k", "v") if self.kind == "kv" else ("state", "window_k", "window_v", "seen")


@dataclass
class StepGraph:
    """What decoding needs of a model; the parameters are the model's own objects.

    step: GraphModule of w tokens after n others; first: the same for n = 0, where attention reads the new keys directly.
    Placeholders of both, in order: token inputs [B, w] by their names, `columns` int64 [w] (the places n .. n+w-1),
    `slots` int64 [n+w], `table_i` (history outputs over all columns), `past_i` (history outputs at the w columns), and per
    site i `k_i`, `v_i`, or `state_i`, `window_k_i`, `window_v_i`, `seen_i`.  They return the logits [B, w, vocabulary] and
    the new recurrent states; the KV buffers are written in place.
    history: GraphModule from the inputs over all n+w columns to (tables ..., running sums ...); None when there is neither.
    inputs: names of the token inputs, ids first.  tables: number of tables.  past_axes: token axis of each running sum.
    limit: most tokens the position tables allow, None without limit.
    """

    step: torch.fx.GraphModule
    first: torch.fx.GraphModule
    history: torch.fx.GraphModule | None
    inputs: tuple[str, ...]
    sites: tuple[SiteState, ...]
    tables: int
    past_axes: tuple[int, ...]
    limit: int | None

    @property
    def shared(self) -> tuple[str, ...]:
        """The placeholders that are not state, in order."""
        tables = tuple(f"table_{n}" for n in range(self.tables))
        return (*self.inputs, "columns", "slots", *tables, *(f"past_{n}" for n in range(len(self.past_axes))))
