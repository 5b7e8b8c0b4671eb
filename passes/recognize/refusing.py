"""How the interpreter says that something is no attention it understands."""

from __future__ import annotations

import torch.fx


class NotAttention(Exception):
    """Raised inside the interpreter with the sentence that becomes a refusal's reason, and the node it is about.

    kind: a stable word for the reason, by which advice is found; "" when there is none.
    """

    def __init__(self, reason: str, node: torch.fx.Node, kind: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.kind = reason, node, kind
