"""What running a decoder needs to know of its model: token inputs, history, and the state of each attention site."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx

from subquad.runtime.width_class import WidthClass, width_classes

BATCH = "batch"
"""The name of the number of rows among the sizes of a value."""


@dataclass(frozen=True)
class SiteState:
    """The state of one attention site.

    kind: "kv" (buffers [B, capacity, kv_heads, key_dim | value_dim] in `dtype`) or "recurrent" (state [B, heads, features,
    value_dim (+ 1 with `sums`)] in fp32, or fp64 for fp64 models, and a window of `window` slots).
    """

    kind: str
    dtype: torch.dtype
    kv_heads: int
    key_dim: int
    value_dim: int
    heads: int = 0
    features: int = 0
    window: int = 0
    sums: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The placeholders that carry the state, without the site's number."""
        return ("k", "v") if self.kind == "kv" else ("state", "window_k", "window_v", "seen")


@dataclass(frozen=True)
class Fixed:
    """What the inputs that do not grow with the tokens contribute: computed once a run, and read by every pass.

    inputs: their names, as what an encoder made, its padding mask, or what it reads.  graph: GraphModule from them to the
    values that passes read, such as keys and values of cross attention.  forms: dtype and sizes of each value; "batch"
    stands for the rows, any other name for a size of the inputs.
    """

    inputs: tuple[str, ...]
    graph: torch.fx.GraphModule
    forms: tuple[tuple[torch.dtype, tuple[int | str, ...]], ...]

    def values(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The values that passes read, in memory of their own; inputs: tensors in the order of the names."""
        with torch.inference_mode():
            return tuple(value.contiguous() for value in self.graph(*inputs))


@dataclass(frozen=True)
class DecoderLayout:
    """The inputs, states and limits of a decoder.

    history: GraphModule from the inputs over all n+w columns to (tables ..., running sums ...); None when there is neither.
    inputs: names of the token inputs, ids first.  tables: number of tables.  past_axes: token axis of each running sum.
    limit: most tokens the position tables allow, None without limit.  fixed: what other inputs contribute, if there are any.
    """

    history: torch.fx.GraphModule | None
    inputs: tuple[str, ...]
    sites: tuple[SiteState, ...]
    tables: int
    past_axes: tuple[int, ...]
    limit: int | None
    fixed: Fixed | None = None

    @property
    def trees(self) -> bool:
        """Whether a pass may run a tree of tokens: states and history must not depend on the tokens before in order."""
        reads_ids = self.history is not None and bool(next(iter(self.history.graph.nodes)).users)
        return not reads_ids and all(site.kind == "kv" for site in self.sites)

    @functools.cached_property
    def state_names(self) -> tuple[tuple[str, ...], ...]:
        """The placeholders of each site's state."""
        return tuple(tuple(f"{name}_{n}" for name in site.names) for n, site in enumerate(self.sites))

    @functools.cached_property
    def token_bytes(self) -> int:
        """Bytes of keys and values that a token leaves in all sites together."""
        kv = [site for site in self.sites if site.kind == "kv"]
        return sum(site.kv_heads * (site.key_dim + site.value_dim) * site.dtype.itemsize for site in kv)

    @functools.cached_property
    def classes(self) -> tuple[WidthClass, ...]:
        """The classes of calls for which the decoder is compiled."""
        return width_classes(any(site.kind == "recurrent" for site in self.sites))
