"""nn.TransformerEncoder while it is captured: padded rows zero, as the nested tensors leave them that no graph holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Nested:
    """met: a forward went the way that the original takes with nested tensors, which it does without gradients only."""

    met: bool = False

    def forward(self, original: Any) -> Any:
        """`TransformerEncoder.forward` on padded rows instead of nested tensors, with zeros where those have no element.

        Nested tensors are taken of rows that are padded at the right; the graph itself looks whether they are.
        """

        @functools.wraps(original)
        def call(
            encoder: nn.TransformerEncoder,
            src: Tensor,
            mask: Any = None,
            src_key_padding_mask: Any = None,
            is_causal: Any = None,
        ) -> Tensor:
            if mask is not None or src_key_padding_mask is None or not _packs(encoder, src):
                return original(encoder, src, mask, src_key_padding_mask, is_causal)  # type: ignore[no-any-return]
            self.met = True
            norm, encoder.norm = encoder.norm, None
            try:
                out = original(encoder, src, mask, src_key_padding_mask, is_causal)
            finally:
                encoder.norm = norm
            boolean = src_key_padding_mask.dtype == torch.bool
            kept = ~src_key_padding_mask if boolean else src_key_padding_mask == 0
            lengths = kept.sum(1, keepdim=True)
            to_the_right = (kept == (torch.arange(kept.shape[1], device=kept.device) < lengths)).all()
            out = out.masked_fill((~kept & to_the_right)[..., None], 0.0)
            return out if norm is None else norm(out)  # type: ignore[no-any-return]

        return call


def _packs(encoder: nn.TransformerEncoder, src: Tensor) -> bool:
    checked = getattr(encoder, "use_nested_tensor", False) and getattr(encoder, "mask_check", True)
    return bool(checked) and not encoder.layers[0].training and src.dim() == 3 and not torch.is_autocast_enabled()
