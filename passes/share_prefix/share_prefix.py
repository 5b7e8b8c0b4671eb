"""`share_prefix`: what the rows of a batch provably have in common is computed once, and its keys are read by all rows.

    f([p; x₁], …, [p; x_B])   →   prefix graph on p, once; suffix graph on x₁ … x_B, which reads the prefix's keys and values

The columns are proved equal by the graph itself: tokens or a learned prefix in front of every row, tables of keys and values
that are expanded to the batch, an encoder's output for several decoded rows.  Attention merges partial states by their
log-sum-exp.  The result is the same function up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from subquad.ir.contract import Contract
from subquad.ir.network_rewrite import NETWORK, NetworkRewrite
from subquad.ir.refusal import Refusal
from subquad.passes.canonicalize.tidy import tidy
from subquad.passes.share_prefix.column_split import ColumnSplit
from subquad.passes.share_prefix.find_prefixes import grouping
from subquad.passes.share_prefix.shared_rows import shared_rows


@dataclass(frozen=True)
class SharePrefix(NetworkRewrite):
    """Shared-prefix attention (Hydragen, Juravsky et al. 2024, section 3), applied to the whole network."""

    name: ClassVar[str] = "share_prefix"
    contract: ClassVar[Contract] = Contract.EXACT
    matches: ClassVar[str] = "columns that all rows of a batch provably share"
    paper: ClassVar[str] = "arXiv:2402.05099"

    def rewrite(self, module: torch.fx.GraphModule) -> str | Refusal:
        """Cut the graph at its shared columns."""
        claims = shared_rows(module)
        split = ColumnSplit(module, claims)
        split.run()
        tidy(module)
        if not split.sites.count and not split.sites.keys_only:
            groups = sorted({grouping(claim.group) for claim in claims.values() if claim.group != 0})
            reason = "no attention reads columns that all rows of a batch provably share"
            reason += f" ({groups[0]} share some)" if groups else split.first_joint()
            return Refusal(NETWORK, self.name, reason + ".")
        found = []
        if split.sites.count:
            found.append(f"{_attentions(split.sites.count)} and what lies between them compute shared columns once")
        if split.sites.keys_only:
            found.append(f"{_attentions(split.sites.keys_only)} read shared keys once for all rows")
        return "; ".join(found) + split.first_joint()


def _attentions(count: int) -> str:
    return f"{count} attention{'' if count == 1 else 's'}"
