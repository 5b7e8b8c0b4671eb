"""Grow a draft tree level by level from guesses, most probable nodes first (the dynamic tree of EAGLE-2, 2406.16858)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subquad.ir.draft import DraftTree
from subquad.kernels.largest import top_tokens

Guess = Callable[[int, Tensor], Tensor]
"""(level, paths int64 [n, level] below the pending token) → scores [n, R] of the tokens that may follow each path."""


def grow(pending: int, guess: Guess, ids: Tensor, rows: int, depth: int, branch: int, least: float) -> DraftTree:
    """The `rows` nodes of highest probability among the `branch` best children of every node that may have such children.

    guess: scores behind paths of a level.  ids: int64 [R], what the scores are of.  least: a node less probable than this is
    neither drafted nor continued.  A node is at most as probable as the one before it, so that the most probable ones are a tree.
    """
    tokens, parents, values = [pending], [-1], [1.0]
    frontier, paths, level = [0], torch.empty(1, 0, dtype=torch.int64), 0
    while frontier and level < depth:
        scores = guess(level, paths).float()
        places = top_tokens(scores, min(branch, scores.shape[1]))
        found = (scores.gather(1, places) - scores.logsumexp(1, keepdim=True)).exp()
        below = []
        for row, (parent, chances, follow) in enumerate(
            zip(frontier, found.tolist(), ids[places].tolist(), strict=True)
        ):
            for chance, token in zip(chances, follow, strict=True):
                value = values[parent] * min(1.0, chance)
                if value < least:
                    break
                below.append((len(tokens), row))
                tokens.append(token)
                parents.append(parent)
                values.append(value)
        enough = sorted(values[1:], reverse=True)[:rows]
        bar = enough[-1] if len(enough) == rows else 0.0
        kept = [(node, row) for node, row in below if values[node] >= bar]
        frontier = [node for node, _ in kept]
        more = torch.tensor([[tokens[node]] for node in frontier], dtype=torch.int64).view(-1, 1)
        paths = torch.cat([paths[[row for _, row in kept]], more], 1)
        level += 1
    order = sorted(range(1, len(tokens)), key=lambda n: -values[n])[:rows]
    place = {node: n for n, node in enumerate([0, *order])}
    return DraftTree(
        tuple(tokens[n] for n in place),
        (-1, *(place[parents[n]] for n in order)),
        tuple(values[n] for n in place),
    )
