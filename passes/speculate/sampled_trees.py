"""Grow a tree of tokens drawn from a draft model, level by level; the draft model verifies the tree that there is so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from subquad.ir.decoding import Choice, OpenStepper, RollbackStepper, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.draft_model import law_of, read


class DrawnTree:
    """A tree under construction: tokens, parents, and per node the law and the draws of its children."""

    def __init__(self, pending: int) -> None:
        self.tokens, self.parents = [pending], [-1]
        self.laws: list[Tensor | None] = [None]
        self.draws: list[list[int]] = [[]]

    def child(self, node: int, token: int) -> int:
        """The child of a node that carries a token, made when there is none; counts as one more draw."""
        found = next((c for c in self.draws[node] if self.tokens[c] == token), None)
        if found is None:
            found = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.laws.append(None)
            self.draws.append([])
        self.draws[node].append(found)
        return found

    def path(self, node: int) -> list[int]:
        """The tokens from below the root down to a node."""
        found: list[int] = []
        while node > 0:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]

    def done(self) -> DraftTree:
        """The tree as a value."""
        return DraftTree(
            tuple(self.tokens), tuple(self.parents), laws=tuple(self.laws), draws=tuple(map(tuple, self.draws))
        )


Level = Callable[[DrawnTree, int, Callable[[int], Tensor]], None]
"""(tree, depth, law of a node) → adds the nodes of that depth."""


@dataclass
class TreeDrafting:
    """Drafts of one sequence: a level function adds nodes as long as there is depth and a budget of rows.

    plan: (rows, depth) → the levels to draw; an empty plan is no draft.
    """

    tokens: list[int]
    choice: Choice
    stepper: RollbackStepper
    vocabulary: int
    plan: Callable[[int, int], Sequence[Level]]
    _unread: int = 1

    @staticmethod
    def begin(
        open_stepper: OpenStepper, tokens: Sequence[int], choice: Choice, vocabulary: int,
        plan: Callable[[int, int], Sequence[Level]],
    ) -> TreeDrafting:  # fmt: skip
        """The draft model reads the prompt."""
        return TreeDrafting(list(tokens), choice, read(open_stepper, tokens), vocabulary, plan)

    def propose(self, rows: int, depth: int) -> DraftTree:
        """Level after level; the draft model runs once a level, over the whole tree so far."""
        tree = DrawnTree(self.tokens[-1])
        for number, level in enumerate(self.plan(rows, depth)):
            if number == 0:
                logits = self._read()
            else:
                shape = tree.done()
                logits = self.stepper.verify([DraftTree(shape.tokens, shape.parents)])[0]
                self.stepper.commit([()])

            def law(node: int, logits: Tensor = logits) -> Tensor:
                kept = tree.laws[node]
                if kept is None:
                    tokens = [*self.tokens, *tree.path(node)]
                    kept = tree.laws[node] = law_of(logits[node : node + 1], tokens, self.choice, self.vocabulary)
                return kept

            level(tree, number + 1, law)
        return tree.done() if len(tree.tokens) > 1 else DraftTree((self.tokens[-1],), (-1,))

    def _read(self) -> Tensor:
        """Feed what was committed since; the pending token's logits come back, the token itself stays outside the state."""
        feed = tuple(self.tokens[-self._unread :])
        logits = self.stepper.verify([DraftTree.chain(feed)])[0]
        self.stepper.commit([range(len(feed) - 1)])
        self._unread = 1
        return logits[-1:]

    def observe(self, result: Verified) -> None:
        """The committed tokens are read with the next draft."""
        self.tokens += result.tokens
        self._unread += len(result.tokens)


def without_replacement(law: Tensor, count: int, choice: Choice) -> list[int]:
    """Up to `count` different tokens drawn one after the other from a law [V], the likeliest ones when decoding is greedy."""
    if choice.greedy:
        return [int(t) for t in law.topk(count).indices if law[t] > 0]
    left, found = law.clone()[None], []
    for _ in range(count):
        if float(left.sum()) <= 0:
            break
        found.append(choice.chance.pick(left))
        left[0, found[-1]] = 0
    return found
