"""`subquad generate OUT --prompt …`: answer a prompt and say how fast."""

from __future__ import annotations

import sys

import click

from subquad.cli import options


@click.command()
@click.argument("out")
@click.option("--prompt", required=True, metavar="TEXT", help="What to answer; - reads it from stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Only the k likeliest tokens; 0 is all.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, help="Nucleus sampling.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without the chat template.")
@click.option("--engine", type=click.Choice(["auto", "subquad", "transformers"]), default="auto", show_default=True)
@click.option("--no-compile", is_flag=True, help="Do not compile the decoder; it takes a minute, once per model.")
@options.opening
@options.as_json
def command(
    out: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    raw: bool,
    engine: str,
    no_compile: bool,
    trust: bool,
    dtype: str,
    attention: str | None,
    as_json: bool,
) -> None:
    """Answer a prompt with OUT (or any MODEL): text on stdout as it comes, speed on stderr."""
    from subquad.cli import printing
    from subquad.text_generation import Compiling, Sampling, generate_text, open_for_generation

    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = open_for_generation(out, trust=trust, dtype=dtype, attention=attention, engine=engine)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    compiling = None if no_compile or engine == "transformers" else Compiling(loaded.module)
    result = generate_text(loaded, text, sampling, raw=raw, engine=engine, on_text=None if as_json else show)
    if as_json:
        printing.print_json(result.json())
    else:
        print()
        for note in result.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(
            f"{len(result.tokens)} tokens, first after {result.first_token_seconds:.2f} s, then "
            f"{result.tokens_per_second:.1f} tokens/s ({result.engine})",
            err=True,
        )
    sys.stdout.flush()
    why = compiling.wait() if compiling is not None and result.engine == "subquad" else None
    if why is not None:
        click.echo(f"note: {why}", err=True)
