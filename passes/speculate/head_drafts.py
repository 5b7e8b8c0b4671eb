"""Grow a draft tree level by level from trained heads, most probable nodes first (the dynamic tree of EAGLE-2, 2406.16858)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.draft_heads import DraftHeads, Guess
from subquad.passes.speculate.sample_and_descend import SampleAndDescend
from subquad.passes.speculate.top_tokens import top_tokens


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


@dataclass(frozen=True, eq=False)
class HeadDrafter:
    """Trees from trained heads, from the second pass on: the first one shows what the model's head of logits read.

    branch: children of a node that are looked at.  least: see `grow`.
    """

    heads: DraftHeads
    branch: int = 4
    least: float = 0.04
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)

    def start(self, tokens: Sequence[int], choice: Choice) -> _Guessing:
        """A sequence; nothing outlives it."""
        return _Guessing(self, tokens[-1])


@dataclass
class _Guessing:
    drafter: HeadDrafter
    last: int
    _hidden: Tensor | None = None

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The most probable nodes by the heads."""
        if self._hidden is None or rows <= 0:
            return DraftTree((self.last,), (-1,))
        one, heads = self.drafter, self.drafter.heads
        with torch.inference_mode():
            guess = heads.guesses(self._hidden, self.last)
            return grow(self.last, guess, heads.ids, rows, min(depth, heads.levels), one.branch, one.least)

    def observe(self, result: Verified) -> None:
        """Keep what was read behind the last accepted node; the token behind that one is pending now."""
        self._hidden = None if result.hidden is None else result.hidden(result.path[-1:])
        self.last = result.tokens[-1]
