"""Random draws from torch's generators, one call of multinomial per drawn token as Hugging Face makes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError


@dataclass(frozen=True)
class TorchChance:
    """generator: None is torch's own, so that torch.manual_seed decides."""

    generator: torch.Generator | None = None

    def happens(self, probability: float) -> bool:
        """One Bernoulli trial; 0 never happens, 1 always does."""
        return bool(torch.rand((), generator=self.generator, dtype=torch.float64) < probability)

    def pick(self, weights: Tensor) -> int:
        """One index drawn from non-negative weights [1, V].  Raises GenerationError when they are no distribution."""
        try:
            return int(torch.multinomial(weights, 1, generator=self.generator))
        except RuntimeError as error:
            raise GenerationError(f"no token can be drawn: {str(error).splitlines()[0]}.") from error

    def uniform(self, count: int) -> Tensor:
        """float64 [count] between 0 and 1."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


def seeded(seed: int | None, device: torch.device) -> TorchChance:
    """Draws of a generator of their own: seeded, or from entropy for None."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return TorchChance(generator)
