"""Scores of frequent tokens from the residual stream inside a network; the base of drafters that leave the model early."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ir.decoding import Drafter
from subquad.ir.errors import GenerationError
from subquad.kernels.wide_linear import wide_linear

EPSILON = 1e-6


class ExitWords(nn.Module, ABC):
    """A norm of its own in front of the model's own head of logits, which is shared and never trained.

    ids: int64 [R], the tokens that are drafted, with their rows [R, d] of the head (after FR-Spec, 2502.14856: all tokens of a
    large vocabulary would cost more than the blocks).  exits: int64 [n], the blocks in front of each exit, ascending.
    """

    name: ClassVar[str]
    """The word for the drafter, under which its parameters are stored."""
    ids: Tensor
    exits: Tensor

    def __init__(self, hidden: int, ids: Tensor, exits: Tensor) -> None:
        """hidden: d."""
        super().__init__()
        self.hidden = hidden
        self.register_buffer("ids", ids)
        self.register_buffer("exits", exits)
        self.scale, self.shift = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.rows = torch.empty(0, hidden)

    @abstractmethod
    def drafter(self) -> Drafter:
        """What drafts with it."""

    @classmethod
    @abstractmethod
    def loaded(cls, parameters: Mapping[str, Tensor], hidden: int) -> Self:
        """From stored parameters, for a stream of width `hidden`; raises KeyError, RuntimeError or ValueError for any others."""

    def begin(self, head: Tensor) -> Self:
        """Beside a model's head of logits [V, d]."""
        self.rows = head.detach()[self.ids].float()
        return self

    def fit(self, stream: Tensor, read: Tensor) -> None:
        """Set the norm so that it comes nearest, number by number, to what the head read there: least squares.

        stream: [n, d] behind an exit.  read: [n, d].  The model's own last norm would be sure of tokens that an early stream
        says nothing about.
        """
        x, y = F.rms_norm(stream, (self.hidden,), eps=EPSILON), read
        centred = x - x.mean(0)
        with torch.no_grad():
            self.scale.copy_((centred * y).sum(0) / centred.square().sum(0).clamp_min(EPSILON))
            self.shift.copy_(y.mean(0) - self.scale * x.mean(0))

    def normed(self, stream: Tensor) -> Tensor:
        """[..., d] of a stream [..., d]."""
        return F.rms_norm(stream, (self.hidden,), eps=EPSILON) * self.scale + self.shift

    def best(self, stream: Tensor) -> tuple[int, float]:
        """The likeliest token behind a stream [1, d], and its probability among the tokens that are drafted."""
        scores = self.product(self.normed(stream), self.rows)[0].float()
        place = int(scores.argmax())
        return int(self.ids[place]), float((scores[place] - scores.logsumexp(0)).exp())

    @classmethod
    def restored(cls, parameters: Mapping[str, Tensor], head: Tensor) -> Self:
        """For drafting from stored parameters, in the dtype of the model's head [V, d].

        Raises GenerationError when the parameters are no such drafter's.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():
                made = cls.loaded(parameters, head.shape[1]).to(head.device, head.dtype).requires_grad_(False)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            why = str(error).splitlines()[-1].strip()
            raise GenerationError(
                f"the stored parameters are no {cls.name} drafter for a model of width {head.shape[1]} ({why}); train it again."
            ) from error
        if int(made.ids.max()) >= head.shape[0]:
            raise GenerationError(
                f"the {cls.name} drafter proposes token {int(made.ids.max())}, but the model has {head.shape[0]} tokens; "
                "train it again."
            )
        made.rows, made.product = head.detach()[made.ids].contiguous(), wide_linear
        return made

    def parameters_by_name(self) -> dict[str, Tensor]:
        """What `restored` reads."""
        found: dict[str, Any] = self.state_dict()
        return {name: tensor.detach() for name, tensor in found.items()}
