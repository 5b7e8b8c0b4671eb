"""Scores over frequent tokens beside a model's head of logits; the base of everything that is trained to draft with it."""

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


class FrequentWords(nn.Module, ABC):
    """Levels that each guess the token i + 1 places behind the pending one, out of R tokens that are frequent in its text.

    words: [R, width], one product for all levels; the model's own head would cost a fifth of a small model per level.
    ids: the R tokens (after FR-Spec, 2502.14856).  levels: how far ahead guesses go.  A token is embedded as its row of the
    model's head of logits [V, d], scaled to length √d.
    """

    name: ClassVar[str]
    """The word for the drafter, under which its parameters are stored."""
    ids: Tensor

    def __init__(self, hidden: int, ids: Tensor, width: int, levels: int) -> None:
        """hidden: d.  ids: int64 [R].  Starts as the papers do: every level repeats the model's own prediction."""
        super().__init__()
        self.hidden, self.width, self.levels = hidden, width, levels
        self.register_buffer("ids", ids)
        self.words = nn.Linear(width, len(ids), bias=False)
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.table = torch.empty(0, hidden)

    @abstractmethod
    def drafter(self) -> Drafter:
        """What drafts with it."""

    @abstractmethod
    def begin(self, start: Tensor) -> None:
        """Initial values; start: [width, d], with which words · start · hidden are about the model's own logits."""

    @classmethod
    @abstractmethod
    def count(cls, names: Mapping[str, Tensor]) -> int:
        """The levels that stored parameters are of."""

    @classmethod
    def shaped(cls, parameters: Mapping[str, Tensor], hidden: int, ids: Tensor, width: int) -> Self:
        """One that stored parameters fit into."""
        return cls(hidden, ids, width, cls.count(parameters))

    def embedded(self, tokens: Tensor) -> Tensor:
        """[..., d] of ids [...]."""
        rows = self.table[tokens].to(self.words.weight.dtype)
        return F.rms_norm(rows, (self.hidden,))

    def fitted(self, head: Tensor) -> Self:
        """These heads beside the model's head of logits [V, d], with their initial values."""
        self.table = head.detach()
        rows = self.table[self.ids].float()
        squares, axes = torch.linalg.eigh(rows.T @ rows)
        start = axes[:, -self.width :].T.contiguous()
        with torch.no_grad():
            self.words.weight.copy_(rows @ start.T)
        self.begin(start)
        return self

    @classmethod
    def restored(cls, parameters: Mapping[str, Tensor], head: Tensor) -> Self:
        """Heads for drafting from stored parameters, in the dtype of the model's head [V, d].

        Raises GenerationError when the parameters are no such heads.
        """
        try:
            width = parameters["words.weight"].shape[1]
            with torch.inference_mode(False), torch.no_grad():
                made = cls.shaped(parameters, head.shape[1], parameters["ids"].clone(), width)
                made.load_state_dict(dict(parameters))
                made = made.to(head.dtype).requires_grad_(False)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            why = str(error).splitlines()[-1].strip()
            raise GenerationError(
                f"the stored parameters are no {cls.name} heads for a model of width {head.shape[1]} ({why}); train them again."
            ) from error
        if int(made.ids.max()) >= head.shape[0]:
            raise GenerationError(
                f"the {cls.name} heads propose token {int(made.ids.max())}, but the model has {head.shape[0]} tokens; "
                "train them again."
            )
        made.table, made.product = head.detach(), wide_linear
        return made

    def parameters_by_name(self) -> dict[str, Tensor]:
        """What `restored` reads."""
        found: dict[str, Any] = self.state_dict()
        return {name: tensor.detach() for name, tensor in found.items()}
