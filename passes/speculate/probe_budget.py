"""Divide a pass's rows between drafted nodes and the prompt tokens behind them (PPD's dynamic sparse tree, 2405.18628, §4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from subquad.ir.draft import DraftTree
from subquad.ir.probes import Probes

LEAST = 0.03
"""Tokens that a row must promise for the next pass; about what it costs beside the others."""


class Prompt(Protocol):
    """Makes the probes."""

    @property
    def copies(self) -> int:
        """Rows that a prompt token takes."""

    def probes(self, counts: Sequence[int]) -> Probes | None:
        """The first counts[n] prompt tokens behind each node n."""


def with_most_worth(tree: DraftTree, rows: int, prompt: Prompt, worth: Sequence[float]) -> DraftTree:
    """The first nodes of a tree, with probes, that promise the most tokens now and in the next pass; at most `rows` below
    the root.

    tree: with values.  worth: tokens accepted in a pass that has guesses of 0, 1, … levels, concave.
    """
    best, counts, most = 0, divided(tree, 0, rows // prompt.copies, worth), -1.0
    for nodes in range(min(rows, len(tree) - 1) + 1):
        found = divided(tree, nodes, (rows - nodes) // prompt.copies, worth)
        last = last_accepted(tree, nodes)
        promise = sum(tree.values[1 : nodes + 1]) + sum(p * worth[count] for p, count in zip(last, found, strict=True))
        if promise > most:
            best, counts, most = nodes, found, promise
    return replace(tree.first(1 + best), probes=prompt.probes(counts))


def last_accepted(tree: DraftTree, nodes: int) -> list[float]:
    """The probability that each of the root and the first nodes is the last one accepted."""
    found = [tree.values[n] for n in range(nodes + 1)]
    for n in range(1, nodes + 1):
        found[tree.parents[n]] -= tree.values[n]
    return [max(0.0, value) for value in found]


def divided(tree: DraftTree, nodes: int, prompts: int, worth: Sequence[float]) -> list[int]:
    """How many of so many prompt tokens stand behind the root and each of the first nodes: where they are worth most.

    None that is worth less than LEAST does, but for the root's where it would be none at all.
    """
    last = last_accepted(tree, nodes)
    gains = [(p * (worth[k] - worth[k - 1]), -n) for n, p in enumerate(last) for k in range(1, len(worth))]
    counts = [0] * (nodes + 1)
    for gain, n in sorted(gains, reverse=True)[: max(0, prompts)]:
        counts[-n] += gain >= LEAST
    return counts if any(counts) else [min(prompts, len(worth) - 1), *counts[1:]]
