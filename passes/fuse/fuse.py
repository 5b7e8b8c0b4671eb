"""`fuse`: an attention site becomes one streaming-softmax operator with its mask as a predicate.

    softmax(scale·QKᵀ + mask) V   →   softmax_attention(q, k, v, mask predicate)

K and V stay un-repeated, blocks of the score matrix that the predicate proves empty are never computed, and neither the
scores nor the mask exist in memory.  The result is the same function up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from subquad.ir.contract import Contract
from subquad.ir.cost import BATCH, TIME, Cost, item_size, keys_of, products, streamed
from subquad.ir.refusal import Refusal
from subquad.ir.rewrite import Rewrite, SiteOperator
from subquad.ir.site import Site
from subquad.kernels.spec import SoftmaxSpec


@dataclass(frozen=True)
class Fuse(Rewrite):
    """Online softmax over blocks (Milakov and Gimelshein 2018, algorithm 3; FlashAttention, Dao et al. 2022, §3.1)."""

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = Contract.EXACT
    matches: ClassVar[str] = "every softmax attention"
    paper: ClassVar[str] = "arXiv:2205.14135"

    def admits(self, site: Site) -> Refusal | None:
        """Every site whose parts the operator has; a site with attention dropout is refused."""
        if site.dropout > 0:
            return Refusal(site.path, self.name, "attention dropout is active; call eval() first.", site.source)
        return None

    def operator(self, site: Site) -> SiteOperator:
        """softmax_attention with the site's scale, softcap, mask predicate and value of empty rows."""
        spec = SoftmaxSpec(
            scale=site.scale, softcap=site.softcap, mask=site.mask.text(), empty_rows=site.mask.empty_rows
        )
        return SiteOperator("softmax_attention", spec.json(), {})

    def cost(self, site: Site) -> Cost:
        """q, k, v and the output once, and each bias once per head; products halved when the mask is causal.

        A bias that is not simply added is first made into one that is, which writes and reads it once more.
        """
        pairs = TIME * keys_of(site) / (2 if "causal" in site.mask.family else 1)
        scores = BATCH * site.heads * TIME * keys_of(site)
        read = sum((scores * item_size(bias.node) for bias in site.biases), sympy.S.Zero)
        made = sum((bias.role != "add" or bias.factor != 1.0 for bias in site.biases), 0)
        made_bytes = 2 * made * BATCH * TIME * keys_of(site) * item_size(site.q.node)
        return Cost(streamed(site) + read + made_bytes, products(site, pairs))
