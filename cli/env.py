"""`subquad env`: versions and machine, for a bug report."""

from __future__ import annotations

import click

from subquad.cli import options


@click.command()
@options.as_json
def command(as_json: bool) -> None:
    """Show the versions and the machine that subquad runs on."""
    from subquad.cli import printing
    from subquad.environment import describe

    facts = describe()
    if as_json:
        printing.print_json(facts)
        return
    rows = [[key, ", ".join(map(str, value)) if isinstance(value, list) else value] for key, value in facts.items()]
    printing.print_table("Environment", ["what", "value"], rows)
