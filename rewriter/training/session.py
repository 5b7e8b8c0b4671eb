"""The run of one stage: progress bar, interruption between batches, and a stored state every so often."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

from subquad.ir.errors import ConversionError
from subquad.progress import progress
from subquad.training.checkpoint import Checkpoint, Progress

STORE_EVERY = 60.0
"""Seconds between stored states."""


class Session:
    """Runs stages batch by batch; what is lost by a kill is at most `every` seconds of work."""

    def __init__(self, checkpoint: Checkpoint, state: Progress, every: float = STORE_EVERY) -> None:
        self.checkpoint, self.state, self.every = checkpoint, state, every
        self._stop = False

    def run(
        self, stage: str, title: str, batches: int, batch_tokens: int, work: Callable[[int], dict[str, float]],
        tensors: Callable[[], dict[str, Tensor]],
    ) -> None:  # fmt: skip
        """Do the batches of a stage that are left.

        work: does batch number n and returns losses to show.  tensors: the stage's whole state.
        Raises ConversionError after an interruption (Ctrl-C), with the state stored.
        """
        first = self.state.batch if self.state.stage == stage else 0
        if self.state.stage != stage:
            self.state.stage, self.state.batch = stage, 0
            self.checkpoint.store(self.state, tensors())
        stored = time.monotonic()
        with self._interruptible(), progress(title, batches) as advance:
            advance(first, title)
            for number in range(first, batches):
                start = time.monotonic()
                losses = work(number)
                spent = time.monotonic() - start
                self.state.batch, self.state.seconds, self.state.losses = number + 1, self.state.seconds + spent, losses
                shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
                advance(1, f"{title}  {shown}  {batch_tokens / spent:.0f} tokens/s")
                due = time.monotonic() - stored >= self.every
                if due or self._stop or number + 1 == batches:
                    self.checkpoint.store(self.state, tensors())
                    stored = time.monotonic()
                if self._stop and number + 1 < batches:
                    raise ConversionError(
                        f"interrupted after batch {number + 1} of {batches} of {title}; the same command goes on from "
                        f"{self.checkpoint.directory}."
                    ) from KeyboardInterrupt()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the stage after the batch at hand; a second one raises KeyboardInterrupt at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: Any = signal.getsignal(signal.SIGINT)

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
