"""A progress bar on stderr when that is a terminal, and nothing at all when it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves the bar on by some steps and may change what it says."""

    def __call__(self, steps: int, text: str | None = None) -> None:
        """steps: how many more are done."""


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Advance]:
    """Show a bar while the block runs; yields `advance(steps, description)`.

    total: number of steps, None for a bar without end.  The bar vanishes when the block ends; in a pipe nothing is written.
    """
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(steps: int, text: str | None = None) -> None:
            bar.update(task, advance=steps, description=text or description)

        yield advance


def _silent(steps: int, text: str | None = None) -> None:
    """What advances a bar that is not shown."""
