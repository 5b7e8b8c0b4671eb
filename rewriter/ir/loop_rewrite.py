"""What every pass is, and what a rewrite of a decoding loop is: the drafter it decodes with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from subquad.ir.contract import Contract
from subquad.ir.trained import NOTHING, Trained

if TYPE_CHECKING:
    from subquad.ir.decoding import Drafter


@dataclass(frozen=True)
class Pass(ABC):
    """A frozen dataclass whose fields are its knobs; dropping its module into a family folder of `passes/` registers it."""

    name: ClassVar[str]
    contract: ClassVar[Contract]
    matches: ClassVar[str]
    paper: ClassVar[str]

    def knobs(self) -> dict[str, Any]:
        """The knob values by name, as stored in a plan."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        knobs = ", ".join(f"{key}={value}" for key, value in self.knobs().items())
        return f"{self.name}({knobs})" if knobs else self.name


LOOP = "generate"
"""The path of a model's own decoding loop in plans and reports."""


@dataclass(frozen=True)
class LoopRewrite(Pass):
    """Base of the rewrites of decoding loops."""

    num_speculative_tokens: int = 15

    @property
    def trains(self) -> str | None:
        """The drafter whose parameters `convert` trains, None for one that needs none."""
        return None

    @abstractmethod
    def drafter(self, trained: Trained = NOTHING) -> Drafter:
        """A drafter that has learnt nothing yet beyond what was trained; it serves all calls of one decoder.

        Raises GenerationError when its parameters are missing or belong to another model.
        """
