"""Trees of a draft model's tokens drawn without replacement: RSD-C and RSD-S (Jeon et al. 2402.14160)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, OpenStepper
from subquad.passes.speculate.recursive_rejection import RecursiveRejection
from subquad.passes.speculate.sampled_trees import DrawnTree, Level, TreeDrafting, without_replacement


@dataclass(frozen=True)
class ConstantBranching:
    """RSD-C: every node of depth d gets branching[d] children; (1, 1, …) is speculative sampling.

    open: a fresh stepper of the draft model, which must verify trees.  vocabulary: size of the target's logits.
    """

    open: OpenStepper
    vocabulary: int
    branching: tuple[int, ...] = (2, 1, 1)
    acceptance: AcceptanceRule = field(default_factory=RecursiveRejection)

    def start(self, tokens: Sequence[int], choice: Choice) -> TreeDrafting:
        """The draft model reads the prompt."""
        return TreeDrafting.begin(self.open, tokens, choice, self.vocabulary, partial(self._plan, choice))

    def _plan(self, choice: Choice, rows: int, depth: int) -> Sequence[Level]:
        levels: list[Level] = []
        width, total = 1, 0
        for count in self.branching[:depth]:
            width *= count
            total += width
            if total > rows:
                break
            levels.append(partial(self._level, choice, count))
        return levels

    @staticmethod
    def _level(choice: Choice, count: int, tree: DrawnTree, depth: int, law: Callable[[int], Tensor]) -> None:
        for node in _at(tree, depth - 1):
            for token in without_replacement(law(node), count, choice):
                tree.child(node, token)


def _at(tree: DrawnTree, depth: int) -> list[int]:
    return [node for node in range(len(tree.tokens)) if len(tree.path(node)) == depth]


@dataclass(frozen=True)
class StochasticBeam:
    """RSD-S: a beam of `width` sequences drawn without replacement by perturbed log-probabilities, `length` tokens deep.

    Stochastic beam search (Kool et al. 1903.06059, algorithm 1): a child's perturbed value is its log-probability plus
    Gumbel noise, conditioned on the largest of a node's children having the node's own value.
    """

    open: OpenStepper
    vocabulary: int
    width: int = 2
    length: int = 3
    acceptance: AcceptanceRule = field(default_factory=RecursiveRejection)

    def start(self, tokens: Sequence[int], choice: Choice) -> TreeDrafting:
        """The draft model reads the prompt."""
        return TreeDrafting.begin(self.open, tokens, choice, self.vocabulary, partial(self._plan, choice))

    def _plan(self, choice: Choice, rows: int, depth: int) -> Sequence[Level]:
        beam: list[tuple[int, float, float]] = [(0, 0.0, 0.0)]
        levels = min(depth, self.length, rows // self.width)
        return [partial(self._level, choice, beam)] * levels

    def _level(
        self,
        choice: Choice,
        beam: list[tuple[int, float, float]],
        tree: DrawnTree,
        depth: int,
        law: Callable[[int], Tensor],
    ) -> None:
        """beam: (node, log-probability, perturbed value); replaced by that of the new depth."""
        found: list[tuple[float, float, int, int]] = []
        for node, likelihood, value in beam:
            known = likelihood + law(node).log()
            perturbed = known if choice.greedy else conditioned(known, value, choice.chance.uniform(len(known)))
            best = perturbed.topk(min(self.width, len(known)))
            found += [
                (v, float(known[t]), node, t) for v, t in zip(*map(Tensor.tolist, best), strict=True) if v > -torch.inf
            ]
        found.sort(key=lambda item: -item[0])
        beam[:] = [(tree.child(node, token), known, value) for value, known, node, token in found[: self.width]]


def conditioned(known: Tensor, most: float, uniform: Tensor) -> Tensor:
    """Gumbel-perturbed log-probabilities [V] whose maximum is `most`; −inf stays −inf (Kool et al., appendix B.3)."""
    possible = known > -torch.inf
    noise = -(-uniform[possible].clamp(1e-300, 1 - 1e-16).log()).log()
    values = known[possible] + noise
    gap = most - values + torch.log1p(-torch.exp(values - values.max()))
    fixed = torch.full_like(known, -torch.inf)
    fixed[possible] = most - gap.clamp_min(0) - torch.log1p(torch.exp(-gap.abs()))
    return fixed
