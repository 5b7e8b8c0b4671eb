"""Any Hugging Face causal language model as a Stepper: its own forward, its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError

MASKED = ("sdpa", "eager")
"""Attention implementations that take a mask [1, 1, n, t] as it is given."""


class HuggingFaceStepper:
    """One cache a row.  Trees are masked by ancestors and take their positions from depths.

    trees: True for rotary or learned positions under sdpa or eager attention; relative biases count indices instead.
    """

    def __init__(self, model: Any, trees: bool = False) -> None:
        """model: a PreTrainedModel with plain attention.  Raises GenerationError when its cache cannot be cut back."""
        self.model = model
        self.trees = trees and model.config._attn_implementation in MASKED
        self.limit: int | None = None
        self.caches: list[Any] = []
        self._fed: list[DraftTree | None] = []

    @torch.no_grad()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, V] behind the last token of ids [B, T], padded on the left."""
        found = []
        for n in range(ids.shape[0]):
            real = ids[n] if attention_mask is None else ids[n][attention_mask[n] != 0]
            cache = DynamicCache(config=self.model.config)
            found.append(self._run(real[None], cache, None, None)[-1])
            odd = [type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer]
            if odd:
                raise GenerationError(
                    f"{type(self.model).__name__} keeps a {odd[0]}, which cannot be cut back token by token."
                )
            self.caches.append(cache)
        return torch.stack(found)

    @torch.no_grad()
    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor]:
        """Logits [nodes, V] of each row's tree; [0, 0] for a row that has ended."""
        self._fed = list(trees)
        found = []
        for cache, tree in zip(self.caches, trees, strict=True):
            if tree is None:
                found.append(torch.empty(0, 0))
                continue
            past = cache.get_seq_length()
            ids = torch.tensor([tree.tokens], device=self.model.device)
            mask = positions = None
            if not tree.is_chain:
                assert self.trees
                seen = torch.cat([torch.ones(len(tree), past, dtype=torch.bool), tree.ancestors()], 1)[None, None]
                mask = seen.to(self.model.device)
                if self.model.config._attn_implementation == "eager":
                    least = torch.finfo(self.model.dtype).min
                    mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, least)
                positions = past + torch.tensor([tree.depths], device=self.model.device)
            found.append(self._run(ids, cache, mask, positions))
        return found

    def _run(self, ids: Tensor, cache: Any, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        more = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
        logits: Tensor = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits[0]
        return logits

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes of each row's path."""
        for cache, tree, path in zip(self.caches, self._fed, paths, strict=True):
            if tree is None or len(path) == len(tree):
                continue
            before = cache.get_seq_length() - len(tree)
            if list(path) == list(range(len(path))):
                cache.crop(len(path) - len(tree))
                continue
            kept = torch.tensor([*range(before), *(before + node for node in path)], device=self.model.device)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.index_select(2, kept), layer.values.index_select(2, kept)

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row."""
        for cache, count in zip(self.caches, counts, strict=True):
            if count:
                cache.crop(-count)
