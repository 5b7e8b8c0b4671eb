"""What a rewrite of a whole network is: it edits the captured graph in which operators stand at the attention sites."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch.fx

from subquad.ir.loop_rewrite import Pass
from subquad.ir.refusal import Refusal

NETWORK = "forward"
"""The path of a model's whole graph in plans and reports."""


@dataclass(frozen=True)
class NetworkRewrite(Pass):
    """Base of the rewrites of whole graphs."""

    @abstractmethod
    def rewrite(self, module: torch.fx.GraphModule) -> str | Refusal:
        """Edit the graph in place and say what was done; a Refusal where it cannot be, and the graph is then of no use."""
