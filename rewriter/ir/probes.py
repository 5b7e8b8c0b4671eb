"""Rows that a pass runs beside a draft to ask the model about tokens further on; none of them is ever accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probes:
    """Probes behind nodes of a draft tree.

    nodes: the node that each stands behind.  depths: how many places behind it, from 1 on.  copies: probes of one node and depth
    differ in it.  tokens: ids whose embeddings they start from.  added: [n, e], what is added to these where they enter the
    first block.  seen: bool [n, n], which of the probes each one sees, itself included; beside them it sees what its node sees.
    """

    nodes: tuple[int, ...]
    depths: tuple[int, ...]
    copies: tuple[int, ...]
    tokens: tuple[int, ...]
    added: Tensor
    seen: Tensor

    def __len__(self) -> int:
        return len(self.nodes)

    def behind(self, place: Mapping[int, int]) -> Probes | None:
        """The probes of some nodes, which get other numbers; None where none is left."""
        kept = [n for n, node in enumerate(self.nodes) if node in place]
        if not kept:
            return None
        depths, copies, tokens = (tuple(side[n] for n in kept) for side in (self.depths, self.copies, self.tokens))
        nodes = tuple(place[self.nodes[n]] for n in kept)
        return Probes(nodes, depths, copies, tokens, self.added[kept], self.seen[kept][:, kept])

    def first_copy(self) -> Probes:
        """The probes of the first copy, which are a chain behind each node."""
        kept = [n for n, copy in enumerate(self.copies) if copy == 0]
        depths, tokens, nodes = (tuple(side[n] for n in kept) for side in (self.depths, self.tokens, self.nodes))
        return Probes(nodes, depths, (0,) * len(kept), tokens, self.added[kept], self.seen[kept][:, kept])


def counts_behind(probes: Probes | None, nodes: int) -> list[int]:
    """How many probes stand behind each of so many nodes."""
    found = [0] * nodes
    for node in () if probes is None else probes.nodes:
        found[node] += 1
    return found


def with_probes(ancestors: Tensor, probes: Probes) -> Tensor:
    """bool [n + m, n + m]: what n nodes see of each other (`ancestors`), and what m probes see of both."""
    nodes, more = len(ancestors), len(probes)
    seen = torch.zeros(nodes + more, nodes + more, dtype=torch.bool)
    seen[:nodes, :nodes] = ancestors
    seen[nodes:, :nodes] = ancestors[list(probes.nodes)]
    seen[nodes:, nodes:] = probes.seen
    return seen
