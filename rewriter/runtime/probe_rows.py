"""The probes of draft trees as rows of a pass: what is added to their embeddings, what they see, where they stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from subquad.ir.draft import DraftTree
from subquad.ir.probes import with_probes
from subquad.runtime.pass_inputs import Beside


def probe_rows(trees: Sequence[DraftTree | None], width: int, branching: bool, device: torch.device) -> Beside:
    """The trees of B rows, each filled up to `width` tokens, with their probes behind their nodes; at least one tree has some.

    branching: False where all are chains, probes included, and the model reads them as such.
    """
    like = next(tree.probes.added for tree in trees if tree is not None and tree.probes is not None)
    added = like.new_zeros(len(trees), width, like.shape[1])
    seen = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    depths = torch.zeros(len(trees), width, dtype=torch.int64)
    for row, tree in enumerate(trees):
        if tree is None:
            continue
        nodes, probes = len(tree), tree.probes
        whole = tree.ancestors() if probes is None else with_probes(tree.ancestors(), probes)
        seen[row, : tree.rows, : tree.rows] = whole
        depths[row, :nodes] = torch.tensor(tree.depths)
        if probes is not None:
            added[row, nodes : tree.rows] = probes.added
            behind = [tree.depths[node] + depth for node, depth in zip(probes.nodes, probes.depths, strict=True)]
            depths[row, nodes : tree.rows] = torch.tensor(behind)
    if not branching:
        return Beside(added.to(device), None, None)
    return Beside(added.to(device), seen.to(device), depths.to(device))
