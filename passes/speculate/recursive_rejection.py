"""R3: rejection over siblings drawn without replacement (RSD, Jeon et al. 2402.14160, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subquad.ir.decoding import Chance
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.speculative_sampling import ratio, residual


@dataclass(frozen=True)
class RecursiveRejection:
    """Test the siblings in the order in which they were drawn; each rejection leaves the residual as the next target.

    Given those before it, sibling k has the law of q without them, renormalised; "draw from the residual" may itself be done
    by another round of rejection, so that the emitted token has law p by induction over the siblings.
    """

    def emit(self, scores: Tensor, tree: DraftTree, node: int, chance: Chance) -> int:
        """The first accepted child's token, otherwise a draw from the last residual of softmax(scores [1, V])."""
        target = scores.double().softmax(-1)
        law = tree.law(node)
        if law is None:
            return chance.pick(target)
        draft = law.double().reshape(1, -1).clone()
        for child in tree.drawn(node):
            token = tree.tokens[child]
            if chance.happens(ratio(target, draft, token)):
                return token
            target = residual(target, draft)
            draft[0, token] = 0
            left = draft.sum()
            if left <= 0:
                break
            draft /= left
        return chance.pick(target)
