"""`linearize:lolcats`: softmax over a sliding window and sink tokens, learned linear attention over all other keys.

    y_i = (γ Σ_{j∈W(i)} e^{s_ij − c_i} v_j + Σ_{j∈L(i)} φ(q_i)·ψ(k_j) v_j) / (the same with v → 1)

W(i) holds the last `window` keys, key i included, and the first `sinks` keys; L(i) holds the others up to i; c_i is the
largest score in W(i).  φ and ψ are Hedgehog maps [softmax(xW) ; softmax(−xW)], one W per query head, on q and k after
their rotary embedding and before the scale.  The state has constant size; training it is what `convert` is for.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from subquad.ir.contract import Contract
from subquad.ir.cost import BATCH, TIME, Cost, streamed
from subquad.ir.refusal import Refusal
from subquad.ir.rewrite import Rewrite, SiteOperator
from subquad.ir.site import Site
from subquad.kernels.spec import RecurrenceSpec

HEDGEHOG = ("softmax(x @ w0)", "softmax(-(x @ w0))")
WINDOW_SHARE = 2.2
"""Initial logit of γ: the window starts at nine tenths of its softmax weight, which trains best with few tokens."""


@dataclass(frozen=True)
class Lolcats(Rewrite):
    """LoLCATs (Zhang et al. 2024, §3; its sliding form) over Hedgehog maps (Zhang et al. 2024, arXiv:2402.04347, §4).

    window: keys that keep exact softmax, self included.  sinks: first keys that keep it for ever.  features: width of
    each half of the feature map; the state holds 2·features·(value_dim + 1) floats per head.
    Raises ValueError for a window or width below 1 or negative sinks.
    """

    window: int = 64
    sinks: int = 4
    features: int = 64

    name: ClassVar[str] = "linearize:lolcats"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    matches: ClassVar[str] = "causal softmax attention, with padding at most"
    paper: ClassVar[str] = "arXiv:2410.10254"

    def __post_init__(self) -> None:
        for knob, least in (("window", 1), ("sinks", 0), ("features", 1)):
            value = getattr(self, knob)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{knob} is {value!r}; it must be an integer of at least {least}.")

    def admits(self, site: Site) -> Refusal | None:
        """Causal self-attention whose scores are scale·q·k alone, whose mask is causal and at most hides padding."""
        reason = self._obstacle(site)
        return None if reason is None else Refusal(site.path, self.name, reason, site.source)

    def _obstacle(self, site: Site) -> str | None:
        families = site.mask.family.split(" & ")
        if site.phase != "full":
            return f"the site is in its {site.phase} phase; only self-attention over a whole sequence becomes linear."
        if families[0] != "causal" or any(not family.startswith("padding(") for family in families[1:]):
            return f"the mask is {site.mask.family}; only a causal mask with padding survives a running state."
        if len(families) > 2:
            return f"the mask is {site.mask.family}; the operator takes one padding table."
        if site.softcap is not None:
            return "the scores have a soft cap, which the window's softmax does not apply."
        if site.biases:
            return "the scores have a bias, which keys outside the window would lose."
        if site.gain is not None:
            return "the scores are multiplied by a tensor, which the feature maps do not see."
        if site.sinks is not None:
            return "the softmax has learned sink logits, which a shared denominator would count only for the window."
        if site.dropout > 0:
            return "attention dropout is active; call eval() first."
        return None

    def operator(self, site: Site) -> SiteOperator:
        """The recurrence with a window branch under one denominator."""
        spec = RecurrenceSpec(HEDGEHOG, scale=site.scale, window=self.window, sinks=self.sinks)
        learned = {"feature_q": ("feature_q",), "feature_k": ("feature_k",), "window_gate": ("window_gate",)}
        return SiteOperator("recurrence", spec.json(), learned)

    def parameters(self, site: Site) -> dict[str, torch.Tensor]:
        """feature_q, feature_k [H, K, features] near the identity and window_gate [H]: fp32, the same at every call."""
        generator = torch.Generator().manual_seed(zlib.crc32(site.path.encode()))

        def near_identity() -> torch.Tensor:
            copies = -(-self.features // site.head_dim)
            eye = torch.eye(site.head_dim).repeat(1, copies)[:, : self.features]
            noise = torch.randn(site.heads, site.head_dim, self.features, generator=generator)
            return eye + (0.0 if copies == 1 and self.features == site.head_dim else 0.05) * noise

        return {
            "feature_q": near_identity(),
            "feature_k": near_identity(),
            "window_gate": torch.full((site.heads,), WINDOW_SHARE),
        }

    def cost(self, site: Site) -> Cost:
        """q, k, v and the output once; window products, both feature maps, the state's update and read-out per token."""
        width = 2 * self.features
        window = 2 * (self.window + self.sinks) * (site.head_dim + site.value_dim)
        maps = 4 * site.head_dim * self.features
        state = 4 * width * (site.value_dim + 1)
        return Cost(streamed(site), BATCH * TIME * site.heads * (window + maps + state))

    @classmethod
    def examples(cls) -> Iterator[tuple[nn.Module, tuple[Any, ...], str]]:
        """A causal attention, and a bidirectional one."""
        yield _SelfAttention(causal=True), (torch.randn(2, 9, 16),), "applies"
        yield _SelfAttention(causal=False), (torch.randn(2, 9, 16),), "refuses: only a causal mask"


class _SelfAttention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out
