"""`subquad generate OUT --prompt …`: answer a prompt and say how fast."""

from __future__ import annotations

import sys

import click

from subquad.cli import options

METHODS = ("none", "auto", "suffix", "ngram", "recycling", "trigram")


@click.command()
@click.argument("out")
@click.option("--prompt", required=True, metavar="TEXT", help="What to answer; - reads it from stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Only the k likeliest tokens; 0 is all.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, help="Nucleus sampling.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without the chat template.")
@click.option("--stream/--no-stream", default=True, help="Print text as it is decoded; default: --stream.")
@click.option(
    "--method", type=click.Choice(METHODS), help="How to draft; none decodes one token a step. Default: the plan's."
)
@click.option("--num-speculative-tokens", type=click.IntRange(min=1), help="Most tokens drafted for a step.")
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
    stream: bool,
    method: str | None,
    num_speculative_tokens: int | None,
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
    words = {"method": method, "num_speculative_tokens": num_speculative_tokens}
    speculation = {word: value for word, value in words.items() if value is not None}
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, speculation)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    compiling = None if no_compile or engine == "transformers" else Compiling(loaded.module)
    streamed = stream and not as_json
    result = generate_text(loaded, text, sampling, raw=raw, engine=engine, on_text=show if streamed else None)
    if as_json:
        printing.print_json(result.json())
    else:
        print("" if streamed else result.text)
        for note in result.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(
            f"{len(result.tokens)} tokens, first after {result.first_token_seconds:.2f} s, then "
            f"{result.tokens_per_second:.1f} tokens/s ({result.engine}); {result.mean_accepted:.2f} accepted of "
            f"{result.rows_per_step:.1f} rows a step, {result.draft_share:.1%} of the time for drafting",
            err=True,
        )
    sys.stdout.flush()
    if result.interrupted:
        sys.exit(130)
    why = compiling.wait() if compiling is not None and result.engine == "subquad" else None
    if why is not None:
        click.echo(f"note: {why}", err=True)
