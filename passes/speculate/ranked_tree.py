"""Grow the tree of highest expected acceptance from ranked successors of every token, and learn the ranks' rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

from subquad.ir.draft import DraftTree
from subquad.passes.speculate.rates import Rates

Successors = Callable[[tuple[int, ...]], Sequence[int]]
"""Last tokens of a path, the newest last → tokens that may follow, the likeliest first, all different."""


def prior(key: Any) -> float:
    """The rate of a rank at a depth before anything was counted: falling with the rank."""
    return float(0.4 / (1 + 2 * key[1]))


def grow(context: tuple[int, ...], successors: Successors, rates: Rates, rows: int, depth: int) -> DraftTree:
    """The `rows` paths of the highest product of rates by (depth, rank), best first (Medusa and PPD size their trees so).

    context: as many last tokens as `successors` reads.  Rates are at most 1, so that a parent never comes after its child, and
    no sibling counts more than one ranked before it, so that siblings stand in the order of their ranks.
    """
    tokens, parents, values, paths = [context[-1]], [-1], [1.0], [context]
    heap: list[tuple[float, int, int, int]] = []  # (−value, number, parent, rank)
    known: list[Sequence[int]] = [successors(context)]
    depths = [0]
    number = 0

    def push(parent: int, rank: int, most: float) -> None:
        nonlocal number
        if rank < len(known[parent]) and depths[parent] < depth:
            number += 1
            value = min(most, values[parent] * rates.rate((depths[parent] + 1, rank)))
            heappush(heap, (-value, number, parent, rank))

    push(0, 0, 1.0)
    while heap and len(tokens) <= rows:
        value, _, parent, rank = heappop(heap)
        tokens.append(known[parent][rank])
        parents.append(parent)
        values.append(-value)
        depths.append(depths[parent] + 1)
        paths.append((*paths[parent][1:], tokens[-1]))
        known.append(successors(paths[-1]) if depths[-1] < depth else ())
        push(parent, rank + 1, -value)
        push(len(tokens) - 1, 0, 1.0)
    return DraftTree(tuple(tokens), tuple(parents), tuple(values))


def learn(tree: DraftTree, tokens: Sequence[int], rates: Rates) -> None:
    """Count, along what was committed after the tree's root, which rank was the next token."""
    node: int | None = 0
    for depth, token in enumerate(tokens, 1):
        if node is None or not tree.children[node]:
            return
        for rank, child in enumerate(tree.children[node]):
            rates.add((depth, rank), tree.tokens[child] == token)
        node = tree.child(node, token)
