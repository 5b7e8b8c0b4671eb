"""`subquad verify MODEL OUT`: measure a rewritten model against the original."""

from __future__ import annotations

import click

from subquad.cli import options
from subquad.cli.ending import OK, REFUSED


@click.command()
@click.argument("model")
@click.argument("out")
@options.opening
@options.as_json
def command(model: str, out: str, trust: bool, dtype: str, attention: str | None, as_json: bool) -> int:
    """Run the verification ladder: OUT against MODEL, a float64 run as the judge."""
    import subquad
    from subquad.cli import printing
    from subquad.model_source import open_model

    original = open_model(model, trust=trust, dtype=dtype, attention=attention)
    fast = open_model(out, trust=trust, dtype=dtype)
    report = subquad.verify(original.module, fast.module, original.example_inputs)
    if as_json:
        printing.print_json(report.json())
    else:
        printing.print_verification(report.verification)
        printing.print_notes(report)
    if all(measurement.passed for measurement in report.verification):
        return OK
    click.echo(f"subquad: {out} does not keep the contract of its rewrites; the report says where.", err=True)
    return REFUSED
