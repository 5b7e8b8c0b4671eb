"""Heads that go on learning while they draft, from the guesses that were rejected (OSD, Liu et al. 2310.07177, §3)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, Drafting, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.draft_heads import DraftHeads
from subquad.passes.speculate.head_drafts import HeadDrafter

RATE = 1e-4
"""Learning rate (paper)."""


@dataclass(frozen=True)
class Lesson:
    """A guess that was rejected: hidden [1, d], tokens int64 [1, level + 1] in front of it, and the model's law [1, R]."""

    level: int
    hidden: Tensor
    tokens: Tensor
    law: Tensor


class Pupil:
    """fp32 copies of heads that are updated after every `interval` lessons; the heads that draft then take their values.

    The loss is the forward KL to the model's own law behind the last accepted token, which verification gives for nothing.
    """

    def __init__(self, heads: DraftHeads, interval: int, rate: float = RATE) -> None:
        self.heads, self.interval = heads, interval
        self.copy = copy.deepcopy(heads).float().requires_grad_(True)
        self.copy.product, self.copy.table = F.linear, heads.table
        self.optimiser = torch.optim.AdamW(self.copy.parameters(), lr=rate, weight_decay=0.0)
        self.lessons: list[Lesson] = []
        self.updates = 0
        self._lock = threading.Lock()

    def learn(self, lesson: Lesson) -> None:
        """Keep a lesson, and learn from all that are kept once they are enough."""
        with self._lock:
            self.lessons.append(lesson)
            if len(self.lessons) >= self.interval:
                self._update()
                self.lessons.clear()

    def _update(self) -> None:
        loss = torch.zeros(())
        for level in {lesson.level for lesson in self.lessons}:
            alike = [lesson for lesson in self.lessons if lesson.level == level]
            hidden, tokens, law = (torch.cat([getattr(x, name) for x in alike]) for name in ("hidden", "tokens", "law"))
            guessed = self.copy.scores(level, hidden, tokens).log_softmax(-1)
            loss = loss + F.kl_div(guessed, law, reduction="sum", log_target=True) / len(self.lessons)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        with torch.no_grad():
            for own, learnt in zip(self.heads.parameters(), self.copy.parameters(), strict=True):
                own.copy_(learnt)
        self.updates += 1


@dataclass(frozen=True, eq=False)
class OnlineDistillation:
    """A drafter whose heads are updated after every `interval` rejected guesses, between passes and never inside one."""

    drafter: HeadDrafter
    interval: int
    rate: float = RATE
    pupil: Pupil = field(init=False)

    def __post_init__(self) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            object.__setattr__(self, "pupil", Pupil(self.heads, self.interval, self.rate))

    @property
    def heads(self) -> DraftHeads:
        """What drafts and learns."""
        assert isinstance(self.drafter.heads, DraftHeads)
        return self.drafter.heads

    @property
    def acceptance(self) -> AcceptanceRule:
        """The drafter's own."""
        return self.drafter.acceptance

    def start(self, tokens: Sequence[int], choice: Choice) -> _Learning:
        """A sequence; what was learnt stays."""
        return _Learning(self.pupil, self.drafter.start(tokens, choice), tokens[-1])


@dataclass
class _Learning:
    pupil: Pupil
    inner: Drafting
    last: int
    _hidden: Tensor | None = None

    def propose(self, rows: int, depth: int) -> DraftTree:
        """What the heads draft."""
        return self.inner.propose(rows, depth)

    def observe(self, result: Verified) -> None:
        """Make a lesson of the first level that had not drafted the right token."""
        level, heads = len(result.path) - 1, self.pupil.heads
        with torch.inference_mode(False), torch.enable_grad():
            if self._hidden is not None and level < heads.levels:
                law = result.logits[result.path[-1]].detach().clone().float()[heads.ids].log_softmax(-1)[None]
                tokens = torch.tensor([[self.last, *result.tokens[:level]]])
                self.pupil.learn(Lesson(level, self._hidden, tokens, law))
            read = None if result.hidden is None else result.hidden(result.path[-1:])
            self._hidden = None if read is None else read.detach().clone().float()
        self.last = result.tokens[-1]
        self.inner.observe(result)
