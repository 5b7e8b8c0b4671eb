"""What was trained for the drafters of one model, and the head of logits they were trained beside."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError

ROWS = 64
"""Rows of a head by which it is told from another's."""


@dataclass(frozen=True)
class Trained:
    """Parameters by drafter and name, each with the digest of the head of logits [V, d] that they belong to.

    head: the weight of the present model's head; None where it cannot be told from the rest of the model.
    """

    parameters: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    head: Tensor | None = None

    def of(self, drafter: str) -> tuple[Mapping[str, Tensor], Tensor]:
        """The parameters of a drafter, and the head [V, d].

        Raises GenerationError when there are none, when they were trained for another model, or when there is no head.
        """
        if drafter not in self.parameters:
            raise GenerationError(
                f"the model has no trained {drafter} drafter; rewrite it with 'speculate,method={drafter}' and train that: "
                "subquad convert OUT --text FILE --tokens N -o OUT2."
            )
        head = self.found_head(drafter)
        if self.models[drafter] != head_digest(head):
            raise GenerationError(
                f"the {drafter} drafter was trained for another model or vocabulary; train one for this model with "
                "subquad convert."
            )
        return self.parameters[drafter], head

    def found_head(self, drafter: str) -> Tensor:
        """The head [V, d]; raises GenerationError when there is none."""
        if self.head is None:
            raise GenerationError(
                f"a {drafter} drafter reads what the model multiplies by the weight of its head of logits, and this model "
                "ends in something else; use another method."
            )
        return self.head


NOTHING = Trained()


def head_digest(head: Tensor) -> str:
    """Hash of a head's shape and of some of its rows in bfloat16, the same for a model in every dtype."""
    step = max(1, head.shape[0] // ROWS)
    rows = head.detach()[::step].to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy()
    return f"{zlib.crc32(rows.data, head.shape[0]):08x}-{head.shape[0]}x{head.shape[1]}"
