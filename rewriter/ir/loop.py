"""A decoding loop, as found in a graph, a while_loop, a Python function or a `generate` method: every slot with its line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

ORIGINS = ("function", "generate", "unrolled", "while_loop")
CONTEXTS = ("full prefix", "last token", "slice", "unknown")


@dataclass(frozen=True)
class Slot:
    """What fills one place of a loop.

    kind: the word for it ("argmax", "cat", "full prefix").  detail: the expression it was read from, or what it says in
    words.  source: file:line of the user's code, "" when it comes from a graph or a library.
    """

    kind: str
    detail: str = ""
    source: str = ""

    def json(self) -> dict[str, str]:
        """The public words of a slot."""
        return {"kind": self.kind, "detail": self.detail, "source": self.source}

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail and self.detail != self.kind else self.kind


NONE = Slot("none")


@dataclass(frozen=True)
class Schedule:
    """One way to run a loop that returns the same tokens: its name, whether it applies here, and why or why not."""

    name: str
    applies: bool
    reason: str

    def json(self) -> dict[str, Any]:
        """The public words of a schedule."""
        return {"name": self.name, "applies": self.applies, "reason": self.reason}


@dataclass(frozen=True)
class Loop:
    """One autoregressive loop in its normal form (every loop in use is an instance of it).

    path: the function, module or node that holds it.  origin: one of ORIGINS.  source: file:line of its head.
    model: what is called once per token.  context: what it is fed, one of CONTEXTS.  window: how the prefix is cropped.
    cache: what the loop itself carries from call to call.  positions: how positions reach the model.  select: which row of
    the logits is read.  processors: what changes that row before the choice, in order; a kind "opaque" is code that has no
    name but keeps its meaning, because it is run as it stands.  choice: how a token is chosen from the row.  write: how the
    token joins the others.  stop: every condition that ends the loop or a row.  bound: the loop's own head.  result: what is
    handed back.  effects: what else an iteration does (prints, scores kept, callbacks, yields).  schedules: what may replace
    it without changing a token, and why not.  evidence: how it was found.
    """

    path: str
    origin: str
    source: str
    model: Slot
    context: Slot
    select: Slot
    choice: Slot
    write: Slot
    bound: Slot
    result: Slot
    window: Slot = NONE
    cache: Slot = NONE
    positions: Slot = NONE
    processors: tuple[Slot, ...] = ()
    stop: tuple[Slot, ...] = ()
    effects: tuple[Slot, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    evidence: tuple[str, ...] = ()

    @property
    def state(self) -> tuple[str, ...]:
        """The names of what is carried from one iteration to the next: the tokens, and a cache if there is one."""
        return tuple(slot.detail or slot.kind for slot in (self.context, self.cache) if slot != NONE)

    @property
    def sampler(self) -> str:
        """Processors and choice, in the order in which they run."""
        return " → ".join(slot.kind for slot in (*self.processors, self.choice))

    def json(self) -> dict[str, Any]:
        """The public words of a loop: its fields, with `state` and `sampler` beside them."""
        plain = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {**plain, "state": list(self.state), "sampler": self.sampler}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.json() if isinstance(value, (Slot, Schedule)) else value
