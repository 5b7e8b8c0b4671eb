"""Rows of drafted continuations, computed in the pass of the row that a loop asks for, until the loop leaves the draft."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from subquad.ir.decoding import Choice, Drafter, Drafting, Verified
from subquad.ir.draft import DraftTree
from subquad.runtime.chance import TorchChance
from subquad.runtime.pacing import Pacing


class Lookahead:
    """The drafts of one sequence whose tokens are chosen elsewhere, one at a time.

    The loop's own code chooses from every row, in order, once per token; a draft only decides which rows are there already.
    So tokens, random numbers and stops are those of the loop, whatever is drafted (sample and descend, R1).
    """

    def __init__(self, drafter: Drafter, pacing: Pacing) -> None:
        self.drafter, self.pacing = drafter, pacing
        self.drafting: Drafting | None = None
        self.committed: list[int] = []
        self.tree = DraftTree((), ())
        self.rows: Tensor | None = None
        self.seconds = 0.0
        self._began = 0.0

    def row(self, total: int) -> Tensor | None:
        """The logits [1, V] behind the first `total` tokens, which go on as drafted; None when they were not computed."""
        place = total - len(self.committed)
        if self.rows is None or not 0 <= place < self.rows.shape[0]:
            return None
        return self.rows[place : place + 1].clone()

    def draft(self, tokens: Sequence[int], room: int) -> tuple[int, ...]:
        """A chain of guesses behind tokens that are all settled, at most `room` of them; learns what became of the last one."""
        self._began = time.perf_counter()
        new = list(tokens[len(self.committed) :])
        goes_on = list(tokens[: len(self.committed)]) == self.committed
        if self.drafting is None or self.rows is None or not goes_on or not self._fits(new):
            self.drafting = self.drafter.start(tokens, Choice((), True, TorchChance()))
        else:
            path = tuple(range(len(new)))
            self.pacing.record([self.tree], len(new), self.seconds)
            self.drafting.observe(Verified(self.tree, path, tuple(new), self.rows))
        self.committed, self.rows = list(tokens), None
        allowed = min(self.pacing.allowance(1), room)
        root = DraftTree.chain((tokens[-1],))
        tree = _chain(self.drafting.propose(allowed, allowed)) if allowed > 0 else root
        (cut,) = self.pacing.cut([tree])
        self.tree = cut if cut is not None else root
        return self.tree.tokens[1:]

    def verified(self, rows: Tensor) -> None:
        """Take the logits [1 + drafted, V] of the last settled token and of the draft behind it."""
        self.rows = rows
        self.seconds = time.perf_counter() - self._began

    def _fits(self, new: list[int]) -> bool:
        """True when what was chosen followed the draft up to the last token."""
        return 0 < len(new) <= len(self.tree) and tuple(new[:-1]) == self.tree.tokens[1 : len(new)]


def _chain(tree: DraftTree) -> DraftTree:
    """The path of first children of a tree."""
    path = [0]
    while tree.children[path[-1]]:
        path.append(min(tree.children[path[-1]]))
    values = tuple(tree.values[node] for node in path) if tree.values else ()
    return DraftTree.chain(tuple(tree.tokens[node] for node in path), values)
