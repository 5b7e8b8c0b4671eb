"""Training view of a Hugging Face model: sites are reached by the observers of the attention registry."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from subquad.ir.errors import ConversionError
from subquad.training.sites import Head, Sample, TrainingModel, TrainingSite


def is_served(model: nn.Module, sites: list[TrainingSite]) -> bool:
    """True when the sites' modules carry a site of the registry."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    from subquad.runtime.hf_seam import SITE

    return all(SITE in model.get_submodule(site.path).__dict__ for site in sites)


class RegistryModel(TrainingModel):
    """Every site's observer computes the original's output, the rewritten one, or records; the network runs as it is."""

    def __init__(self, model: nn.Module, sites: list[TrainingSite]) -> None:
        super().__init__(model, sites)
        from subquad.runtime.hf_seam import SITE

        self.original = False
        self.samples: list[Sample | None] | None = None
        self._index = {id(model.get_submodule(site.path)): n for n, site in enumerate(sites)}
        self._seams = [model.get_submodule(site.path).__dict__[SITE] for site in sites]
        for seam in self._seams:
            seam.observer = self._observe
        self.head, self._body = _split(model)

    def hidden(self, ids: Tensor, original: bool = False) -> Tensor:
        """Hidden states before the output layer, or logits when that is not a plain linear layer."""
        self.original = original
        return self._run(ids)

    def reference(self, ids: Tensor) -> Tensor:
        """The network with its adapters switched off and every site on the original."""
        with torch.no_grad(), self.adapters.switched_off() if self.adapters is not None else nullcontext():
            return self.hidden(ids, True)

    def _run(self, ids: Tensor) -> Tensor:
        if self._body is not None:
            states: Tensor = self._body(input_ids=ids, use_cache=False).last_hidden_state
            return states
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def record(self, ids: Tensor) -> list[Sample]:
        """One forward of the original; every site's output is the original's, so that each layer sees its own inputs."""
        self.original, self.samples = True, [None] * len(self.sites)
        try:
            self._run(ids)
            taken = [sample for sample in self.samples if sample is not None]
        finally:
            self.samples = None
        if len(taken) != len(self.sites):
            raise ConversionError(f"{len(self.sites) - len(taken)} attention sites did not run in the model's forward.")
        return taken

    def _observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: Any) -> Tensor | None:
        if not call.causal or call.valid() is not None or call.offset:
            raise ConversionError("training rows are whole and unpadded, but the model built another mask for them.")
        index = self._index[id(module)]
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if not self.original:
            return self.rewritten(index, q, k, v)
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        scaling = getattr(module, "scaling", None)
        out: Tensor = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)[0]
        if self.samples is not None:
            self.samples[index] = Sample(q, k, v, out)
        return out

    def rewritten(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What takes the place of the original's output at a site: [B, T, H, V]."""
        return self.sites[index].predict(q, k, v)

    def close(self) -> None:
        """Remove the observers."""
        for seam in self._seams:
            seam.observer = None


@torch.no_grad()
def _split(model: Any) -> tuple[Head | None, Any]:
    """(output layer, body) when logits are exactly output layer(body's last hidden state), else (None, None)."""
    layer, body = model.get_output_embeddings(), getattr(model, model.base_model_prefix, None)
    if not isinstance(layer, nn.Linear) or body is None:
        return None, None
    ids = torch.arange(4)[None] % layer.out_features
    states = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if states is None or not torch.equal(layer(states), model(input_ids=ids, use_cache=False).logits):
        return None, None
    return (layer.weight, layer.bias), body
