"""`subquad demo`: the whole path on the packaged SmolLM2-135M, with its figures."""

from __future__ import annotations

import click

from subquad.cli import options


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Another Hugging Face language model.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@options.as_json
def command(model: str, new_tokens: int, as_json: bool) -> None:
    """Inspect, rewrite exactly, verify, generate beside the original, save and load, linearize and measure the drift."""
    from subquad.cli import printing
    from subquad.demonstration import demonstrate

    stages = []
    for stage in demonstrate(model, new_tokens):
        stages.append(stage)
        if not as_json:
            printing.print_stage(stage)
    if as_json:
        printing.print_json({"stages": [stage.json() for stage in stages]})
