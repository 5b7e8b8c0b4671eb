"""`subquad bench MODEL OUT`: the original and the rewritten model in one run, as ratios."""

from __future__ import annotations

from pathlib import Path

import click

from subquad.cli import options


@click.command()
@click.argument("model")
@click.argument("out")
@click.option("--prompt", default=None, metavar="TEXT", help="What both answer.")
@click.option("--prompts", type=click.Path(path_type=Path), help="A file of prompts: text, or .jsonl, one a line.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--pairs", type=click.IntRange(min=1), default=3, show_default=True, help="Alternating runs of each.")
@options.opening
@options.as_json
def command(
    model: str,
    out: str,
    prompt: str | None,
    prompts: Path | None,
    new_tokens: int,
    pairs: int,
    trust: bool,
    dtype: str,
    attention: str | None,
    as_json: bool,
) -> None:
    """Measure OUT beside MODEL, alternating; medians of pairs."""
    from subquad.cli import printing
    from subquad.ir.errors import GenerationError
    from subquad.model_source import open_model
    from subquad.prompt_file import read_prompts
    from subquad.speed import PROMPT, compare

    if prompt is not None and prompts is not None:
        raise GenerationError("give either --prompt or --prompts, not both.")
    asked = read_prompts(prompts) if prompts is not None else [prompt or PROMPT]
    original = open_model(model, trust=trust, dtype=dtype, attention=attention)
    fast = open_model(out, trust=trust, dtype=dtype)
    comparison = compare(original, fast, prompts=asked, new_tokens=new_tokens, pairs=pairs)
    if as_json:
        printing.print_json(comparison.json())
        return
    printing.print_figures(comparison)
