"""`subquad inspect MODEL`: what was found, with its evidence, and what was refused, with the reason."""

from __future__ import annotations

import click

from subquad.cli import options
from subquad.cli.ending import MISTAKE, OK, REFUSED


@click.command()
@click.argument("model")
@click.option("--evidence", is_flag=True, help="Say for every site how each part of it was read.")
@options.opening
@options.as_json
def command(model: str, evidence: bool, trust: bool, dtype: str, attention: str | None, as_json: bool) -> int:
    """Show every attention, decoding loop and shared prefix in MODEL, and every refusal."""
    import subquad
    from subquad.cli import printing
    from subquad.model_source import open_model

    loaded = open_model(model, trust=trust, dtype=dtype, attention=attention)
    report = subquad.inspect(loaded.module, loaded.example_inputs)
    report.notes = [*loaded.notes, *report.notes]
    if as_json:
        printing.print_json(report.json())
    else:
        printing.print_sites(report)
        printing.print_refusals("Refused", report.refusals)
        if evidence:
            rows = [[site.path, line] for site in report.sites for line in site.json()["evidence"]]
            printing.print_table("Evidence", ["path", "read from"], rows)
        printing.print_notes(report)
    if report.sites or report.loops or report.prefixes:
        return OK
    nothing = [refusal for refusal in report.refusals if refusal.what == "attention" and not refusal.path]
    if report.refusals and len(nothing) < len(report.refusals):
        return REFUSED
    click.echo(f"subquad: {model} has no attention, decoding loop or shared prefix to work on.", err=True)
    return MISTAKE
