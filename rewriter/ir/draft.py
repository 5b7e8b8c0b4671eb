"""A drafted tree of continuations: what a drafter proposes, a stepper verifies and an acceptance rule walks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from subquad.ir.probes import Probes


@dataclass(frozen=True)
class DraftTree:
    """Token continuations of one sequence as a rooted tree; node 0 is the pending token, committed but not yet in the state.

    tokens: id of every node.  parents: parents[0] is -1, parents[i] < i otherwise; siblings carry distinct tokens.  Nodes
    stand in order of priority, so that the first n of them are a tree too.  values: estimated probability that a node is
    accepted, per node (empty: unknown; values[0] is 1).  laws: per node the distribution float [V] from which its children
    were drawn, None where they were not drawn (empty: none was).  draws: per node its children in the order in which they
    were drawn, an id once for each draw (empty: ascending, once each).  probes: rows that run beside the nodes, None without.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    values: tuple[float, ...] = ()
    laws: tuple[Tensor | None, ...] = ()
    draws: tuple[tuple[int, ...], ...] = ()
    probes: Probes | None = None

    @staticmethod
    def chain(
        tokens: tuple[int, ...], values: tuple[float, ...] = (), laws: tuple[Tensor | None, ...] = ()
    ) -> DraftTree:
        """A tree with one path: the pending token and what is drafted after it."""
        return DraftTree(tokens, tuple(range(-1, len(tokens) - 1)), values, laws)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """What a pass runs for it: nodes and probes."""
        return len(self) + (0 if self.probes is None else len(self.probes))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of every node, ascending."""
        found: list[list[int]] = [[] for _ in self.tokens]
        for node in range(1, len(self.tokens)):
            found[self.parents[node]].append(node)
        return tuple(map(tuple, found))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The depth of every node; that of the pending token is 0."""
        depths = [0] * len(self.tokens)
        for node in range(1, len(self.tokens)):
            depths[node] = depths[self.parents[node]] + 1
        return tuple(depths)

    @cached_property
    def is_chain(self) -> bool:
        """True for a tree with one path."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def child(self, node: int, token: int) -> int | None:
        """The child of a node that carries a token."""
        for below in self.children[node]:
            if self.tokens[below] == token:
                return below
        return None

    def ancestors(self) -> Tensor:
        """bool [n, n]: [i, j] is True when j is i or an ancestor of i."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node in range(1, len(self.tokens)):
            seen[node] |= seen[self.parents[node]]
        return seen

    def first(self, nodes: int) -> DraftTree:
        """The tree of the first `nodes` nodes, at least the root.

        Not for drawn trees: which draws are dropped would depend on what was drawn, and the rules of acceptance would no
        longer be exact.
        """
        if len(self) <= nodes:
            return self
        assert not self.laws, "a drawn tree is cut by depth only"
        count = max(1, nodes)
        kept = None if self.probes is None else self.probes.behind({n: n for n in range(count)})
        return DraftTree(self.tokens[:count], self.parents[:count], self.values[:count], probes=kept)

    def within(self, depth: int) -> DraftTree:
        """The tree without the nodes below a depth; the root always stays."""
        kept = [n for n, d in enumerate(self.depths) if d <= max(0, depth)]
        if len(kept) == len(self):
            return self
        place = {old: new for new, old in enumerate(kept)} | {-1: -1}
        return DraftTree(
            tuple(self.tokens[n] for n in kept),
            tuple(place[self.parents[n]] for n in kept),
            tuple(self.values[n] for n in kept) if self.values else (),
            tuple(self.laws[n] for n in kept) if self.laws else (),
            tuple(tuple(place[c] for c in self.draws[n] if c in place) for n in kept) if self.draws else (),
            None if self.probes is None else self.probes.behind(place),
        )

    def first_path(self) -> DraftTree:
        """The chain that follows the first child of every node: for models that verify no trees.

        Of its probes the first copies behind its last node stay, which are a chain too.
        """
        path = [0]
        while self.children[path[-1]]:
            path.append(self.drawn(path[-1])[0])
        values = tuple(self.values[n] for n in path) if self.values else ()
        laws = tuple(self.laws[n] for n in path) if self.laws else ()
        probes = None if self.probes is None else self.probes.first_copy().behind({path[-1]: len(path) - 1})
        return replace(DraftTree.chain(tuple(self.tokens[n] for n in path), values, laws), probes=probes)

    def drawn(self, node: int) -> tuple[int, ...]:
        """The children of a node in the order in which they were drawn, repetitions included."""
        return self.draws[node] if self.draws else self.children[node]

    def law(self, node: int) -> Tensor | None:
        """The distribution from which the children of a node were drawn, None when they were not."""
        return self.laws[node] if self.laws else None
