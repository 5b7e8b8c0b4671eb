"""What deriving a decoder from a model gives: the graph of a step, the graph of a prefill, and the layout around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx

from subquad.runtime.layout import DecoderLayout

STREAM = "stream"
"""Key in a node's meta: the value is [batch, tokens, ...] and the graph may be cut behind it."""


@dataclass
class StepGraph:
    """The graphs that decode a model; the parameters are the model's own objects.

    step: GraphModule of w tokens after n others; first: the same for n = 0, where attention reads the new keys directly.
    Placeholders of both, in order: token inputs [B, w] by their names, `columns` int64 [w] (the places n .. n+w-1),
    `slots` int64 [n+w], `table_i` (history outputs over all columns), `past_i` (history outputs at the w columns), and per
    site i `k_i`, `v_i`, or `state_i`, `window_k_i`, `window_v_i`, `seen_i`.  They return the logits [B, w, vocabulary] and
    the new recurrent states; the KV buffers are written in place.
    """

    step: torch.fx.GraphModule
    first: torch.fx.GraphModule
    layout: DecoderLayout
