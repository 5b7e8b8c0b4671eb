"""`subquad rewrite MODEL -p PASS -o OUT`: rewrite, verify and save."""

from __future__ import annotations

from pathlib import Path

import click

from subquad.cli import options
from subquad.cli.ending import OK, REFUSED


@click.command()
@click.argument("model")
@click.option("-p", "--pass", "passes", multiple=True, metavar="PASS", help="family:name,knob=value; may be repeated.")
@click.option("--where", metavar="PATTERN", help="Only sites whose module path matches, e.g. 'model.layers.*'.")
@click.option(
    "--plan", "plan_file", metavar="FILE", help="Apply a saved plan (JSON or TOML) instead of choosing passes."
)
@click.option("--no-verify", is_flag=True, help="Skip the verification ladder.")
@options.output
@options.overwrite
@options.opening
@options.as_json
def command(
    model: str,
    passes: tuple[str, ...],
    where: str | None,
    plan_file: str | None,
    no_verify: bool,
    out: str,
    overwrite: bool,
    trust: bool,
    dtype: str,
    attention: str | None,
    as_json: bool,
) -> int:
    """Rewrite MODEL and save it as OUT (a directory, or a .pt2 program when the name ends so).

    Without -p the exact passes are applied where the cost model predicts a gain; other sites are listed as declined.  The
    error of every rewrite is measured; one that breaks its contract is taken back and reported.
    """
    import subquad
    from subquad.artifact import check_output
    from subquad.cli import printing
    from subquad.model_source import open_model
    from subquad.plan_file import read_plan

    check_output(Path(out), overwrite)
    plan = None if plan_file is None else read_plan(Path(plan_file))
    loaded = open_model(model, trust=trust, dtype=dtype, attention=attention)
    fast = subquad.rewrite(
        loaded.module,
        passes=list(passes) or None,
        where=where,
        plan=plan,
        example_inputs=loaded.example_inputs,
        verify=not no_verify,
    )
    report = fast.report
    report.notes = [*loaded.notes, *report.notes]
    if report.applied:
        subquad.save(fast, out, overwrite=overwrite)
        report.notes.append(f"saved to {out}")
    if as_json:
        printing.print_json(report.json())
    else:
        printing.print_applied(report)
        printing.print_refusals("Refused", report.refusals)
        printing.print_verification(report.verification)
        printing.print_notes(report)
    if report.applied:
        return OK
    if report.declined and not (report.refused or report.rolled_back):
        click.echo(
            f"subquad: the cost model declined every site of {model}, so nothing was saved; -p fuse rewrites them all the same.",
            err=True,
        )
        return OK
    click.echo(f"subquad: no site of {model} was rewritten, so nothing was saved; the report says why.", err=True)
    return REFUSED
