"""`subquad bench MODEL OUT`: the original and the rewritten model in one run, as ratios."""

from __future__ import annotations

import click

from subquad.cli import options


@click.command()
@click.argument("model")
@click.argument("out")
@click.option("--prompt", default=None, metavar="TEXT", help="What both answer.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--pairs", type=click.IntRange(min=1), default=3, show_default=True, help="Alternating runs of each.")
@options.opening
@options.as_json
def command(
    model: str,
    out: str,
    prompt: str | None,
    new_tokens: int,
    pairs: int,
    trust: bool,
    dtype: str,
    attention: str | None,
    as_json: bool,
) -> None:
    """Measure OUT beside MODEL, alternating; medians of pairs."""
    from subquad.cli import printing
    from subquad.model_source import open_model
    from subquad.speed import PROMPT, compare

    original = open_model(model, trust=trust, dtype=dtype, attention=attention)
    fast = open_model(out, trust=trust, dtype=dtype)
    comparison = compare(original, fast, prompt=prompt or PROMPT, new_tokens=new_tokens, pairs=pairs)
    if as_json:
        printing.print_json(comparison.json())
        return
    printing.print_figures(comparison)
