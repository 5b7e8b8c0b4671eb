"""`subquad convert OUT --text FILE --tokens N -o OUT2`: train the approximate rewrites of OUT, and its drafter."""

from __future__ import annotations

from typing import Any

import click

from subquad.cli import options


@click.command()
@click.argument("out")
@click.option("--text", required=True, metavar="FILE", help="Training text (.txt, or .gz of it).")
@click.option("--tokens", required=True, type=click.IntRange(min=1), help="Tokens to process over all stages.")
@click.option("-o", "--output", "target", required=True, metavar="OUT2", help="Directory to write.")
@options.overwrite
@options.trust
@options.as_json
def command(out: str, text: str, tokens: int, target: str, overwrite: bool, trust: bool, as_json: bool) -> None:
    """Train whatever parameters the rewrites of OUT added, a drafter's too, against the model; resumes after an interruption."""
    from pathlib import Path

    import subquad
    from subquad.artifact import check_output
    from subquad.cli import printing
    from subquad.ir.report import Report

    check_output(Path(target), overwrite)
    fast = subquad.load(out, trust=trust)
    trained: Any = subquad.convert(fast, text=text, tokens=tokens, out=target, overwrite=overwrite)
    report: Report = trained.report
    if as_json:
        printing.print_json(report.json())
        return
    printing.print_conversion(report)
    printing.print_notes(report)
