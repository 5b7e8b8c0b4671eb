"""A Hugging Face cache layer that keeps the recurrent state of a linearized attention instead of its keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

TAG = "_subquad_layer"
"""Attribute by which the keys that `update` returns carry their layer to the attention function."""


class RecurrentLayer(CacheLayerMixin):  # type: ignore[misc]
    """State of one linearized layer: constant bytes, whatever the length.

    `state` holds the operator's (state [B, H, F, V+1] fp32, window_k, window_v [B, sinks+window, Hkv, D], seen [B]).
    `update` returns the new keys and values as they are, tagged with this layer.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: tuple[torch.Tensor, ...] | None = None
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate: the operator makes the state."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass the new keys [B, Hkv, T, D] on; the attention function advances the state."""
        self.is_initialized = True
        self.length += key_states.shape[-2]
        keys = key_states.view_as(key_states)
        setattr(keys, TAG, self)
        return keys, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys a mask must cover, first key's position)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows that beam search chose."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self.state = tuple(part.repeat_interleave(repeats, dim=0) for part in self.state)

    def _select(self, rows: torch.Tensor) -> None:
        if self.state is not None:
            self.state = tuple(part.index_select(0, rows.to(part.device)) for part in self.state)

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrent state cannot forget single tokens."""
        if tokens_to_remove:
            raise ValueError(
                "a linearized layer keeps no single keys, so its cache cannot be cropped; copy it before instead."
            )


def with_recurrent_layers(cache: Cache, layers: set[int]) -> Cache:
    """Replace the given layers of a fresh cache by recurrent ones, in place."""
    if not isinstance(getattr(cache, "layers", None), list):
        return cache
    while len(cache.layers) <= max(layers):
        cache.layers.append(DynamicLayer())
    for index in layers:
        cache.layers[index] = RecurrentLayer()
    return cache
