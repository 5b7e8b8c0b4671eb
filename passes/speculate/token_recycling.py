"""Drafts from what the model last ranked highest after each token (Token Recycling, Luo et al. 2408.08696)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.kernels.largest import top_tokens
from subquad.passes.speculate.ranked_tree import grow, learn, prior
from subquad.passes.speculate.rates import Rates
from subquad.passes.speculate.sample_and_descend import SampleAndDescend


class Successors:
    """For every token the ids that the model ranked highest when it last saw the token: int32 [V, width], −1 unknown."""

    def __init__(self, width: int) -> None:
        self.table = array("i")
        self.width = width

    def of(self, token: int) -> list[int]:
        """The successors of a token, the likeliest first; empty when it was never seen."""
        found = self.table[token * self.width : (token + 1) * self.width].tolist()
        return found if found and found[-1] >= 0 else []

    def write(self, tokens: Sequence[int], ids: Sequence[Sequence[int]], vocabulary: int) -> None:
        """Replace the successors of tokens by ids [n, at most width]; the last of equal tokens wins."""
        if len(self.table) < vocabulary * self.width:
            self.table.extend(array("i", [-1]) * (vocabulary * self.width - len(self.table)))
        for token, found in zip(tokens, ids, strict=True):
            begin = token * self.width
            self.table[begin : begin + len(found)] = array("i", found)


@dataclass(frozen=True)
class TokenRecycling:
    """A matrix of successors that outlives its sequences, and a tree over it sized by measured rates.

    width: successors kept per token (paper: 8).  most: nodes at most (paper: 80; a CPU wants few).  depth: paper 6.  The
    paper's static tree is replaced by the best tree under the rates of its ranks, which are learnt as it is used.
    """

    width: int = 8
    most: int = 80
    depth: int = 6
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)
    rates: Rates = field(default_factory=lambda: Rates(prior))
    successors: Successors = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "successors", Successors(self.width))

    def start(self, tokens: Sequence[int], choice: Choice) -> _Recycling:
        """A sequence; the matrix stays."""
        return _Recycling(self, tokens[-1])


@dataclass
class _Recycling:
    drafter: TokenRecycling
    last: int
    _proposed: DraftTree | None = None

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The best tree of successors of the pending token."""
        one = self.drafter
        of = one.successors.of
        self._proposed = grow(
            (self.last,), lambda path: of(path[-1]), one.rates, min(rows, one.most), min(depth, one.depth)
        )
        return self._proposed

    def observe(self, result: Verified) -> None:
        """Keep the ranking behind every verified token, the rejected ones too."""
        one = self.drafter
        if self._proposed is not None:
            learn(self._proposed, result.tokens, one.rates)
            self._proposed = None
        ids = top_tokens(result.logits, one.width).tolist()
        one.successors.write(result.tree.tokens, ids, result.logits.shape[1])
        self.last = result.tokens[-1]
