"""S2D: copies of the model's first blocks with several exits, each of which can draft (Kavehzadeh et al. 2407.01955, §3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor

from subquad.passes.speculate.exit_words import ExitWords
from subquad.passes.speculate.sorted_exits import SortedDrafter

PREFIX = "blocks."


class S2D(ExitWords):
    """One norm and the model's own head serve all exits, as in the paper; the embedding is the model's.

    weights: those of the first blocks by the names that the decoder has for them.
    """

    name: ClassVar[str] = "s2d"

    def __init__(self, hidden: int, ids: Tensor, exits: Tensor, weights: Mapping[str, Tensor]) -> None:
        super().__init__(hidden, ids, exits)
        self.weights = dict(weights)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks in front of each exit."""
        return tuple(self.exits.tolist())

    def drafter(self) -> SortedDrafter:
        """Chains in which every token comes from the smallest sub-model that is sure of it."""
        return SortedDrafter(self)

    @classmethod
    def loaded(cls, parameters: Mapping[str, Tensor], hidden: int) -> Self:
        """From stored parameters."""
        weights = {n.removeprefix(PREFIX): t.clone() for n, t in parameters.items() if n.startswith(PREFIX)}
        made = cls(hidden, parameters["ids"].clone(), parameters["exits"].clone(), weights)
        made.load_state_dict({n: t for n, t in parameters.items() if not n.startswith(PREFIX)})
        if not made.blocks or list(made.blocks) != sorted({*made.blocks} - {0}) or not weights:
            raise ValueError(f"{len(weights)} weights of blocks with exits {list(made.blocks)}")
        return made

    def parameters_by_name(self) -> dict[str, Tensor]:
        """What `restored` reads."""
        return super().parameters_by_name() | {PREFIX + name: t.detach() for name, t in self.weights.items()}
