"""`subquad inspect MODEL`: what was found, with its evidence, and what was refused, with the reason."""

from __future__ import annotations

import click

from subquad.cli import options
from subquad.cli.ending import MISTAKE, OK, REFUSED


@click.command()
@click.argument("model")
@click.option("--evidence", is_flag=True, help="List for every single site how each part of it was read.")
@options.opening
@options.as_json
def command(model: str, evidence: bool, trust: bool, dtype: str, attention: str | None, as_json: bool) -> int:
    """Show every attention, decoding loop and shared prefix in MODEL, how each was read, and every refusal.

    Each site says how it is spelled, how its mask was proved, where q, k and v come from, and what `subquad rewrite` would
    do with it; each refusal the line of code and what would make it rewritable.
    """
    import subquad
    from subquad.cli import inspect_printing, printing
    from subquad.model_source import open_model
    from subquad.pipeline import choose

    loaded = open_model(model, trust=trust, dtype=dtype, attention=attention)
    report = subquad.inspect(loaded.module, loaded.example_inputs)
    report.notes = [*loaded.notes, *report.notes]
    chosen = {site.path: str(step) for site, step in choose(None, report.sites, report)}
    if as_json:
        printing.print_json({**report.json(), "chosen": chosen})
    else:
        inspect_printing.explain(report, chosen)
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
