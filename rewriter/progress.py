"""A progress bar on stderr when that is a terminal, and nothing at all when it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int, str | None], None]]:
    """Show a bar while the block runs; yields `advance(steps, description)`.

    total: number of steps, None for a bar without end.  The bar vanishes when the block ends; in a pipe nothing is written.
    """
    if not sys.stderr.isatty():
        yield lambda steps, text=None: None
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
        yield lambda steps, text=None: bar.update(task, advance=steps, description=text or description)
