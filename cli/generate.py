"""`subquad generate OUT --prompt …` or `--prompts FILE`: answer one prompt, or many together, and say how fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from subquad.cli import options

if TYPE_CHECKING:
    from subquad.model_source import LoadedModel
    from subquad.text_generation import Compiling, Sampling

METHODS = ("none", "auto", "suffix", "ngram", "recycling", "trigram", "layer_skip", "medusa", "hydra",
           "chimera", "falcon", "ppd", "kangaroo", "s2d")  # fmt: skip


@click.command()
@click.argument("out")
@click.option("--prompt", metavar="TEXT", help="What to answer; - reads it from stdin.")
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Many prompts, one a line (text or .jsonl); what they have in common is computed once.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Prompts that run together."
)
@click.option("--no-share", is_flag=True, help="Compute what prompts have in common for each of them.")
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
    prompt: str | None,
    prompts: Path | None,
    batch_size: int,
    no_share: bool,
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
    """Answer prompts with OUT (or any MODEL): text on stdout as it comes, speed and what was shared on stderr."""
    if (prompt is None) == (prompts is None):
        raise click.UsageError("give --prompt TEXT or --prompts FILE, one of the two.")
    if prompts is not None and engine == "transformers":
        raise click.UsageError("--prompts runs on subquad's decoder; leave out --engine transformers.")
    from subquad.cli import printing
    from subquad.prompt_file import read_prompts
    from subquad.text_generation import Compiling, Sampling, generate_text, open_for_generation

    text = sys.stdin.read() if prompt == "-" else prompt
    asked = None if prompts is None else read_prompts(prompts)
    loaded = open_for_generation(out, trust=trust, dtype=dtype, attention=attention, engine=engine)
    words = {"method": method, "num_speculative_tokens": num_speculative_tokens}
    speculation = {word: value for word, value in words.items() if value is not None}
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, speculation)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    compiling = None if no_compile or engine == "transformers" else Compiling(loaded.module)
    if asked is not None:
        interrupted = _many(loaded, asked, sampling, raw, batch_size, not no_share, as_json)
        _finish(interrupted, compiling)
        return
    assert text is not None
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
    _finish(result.interrupted, compiling if result.engine == "subquad" else None)


def _finish(interrupted: bool, compiling: Compiling | None) -> None:
    """Leave as an interrupted command does, or once the compiler is done."""
    sys.stdout.flush()
    if interrupted:
        sys.exit(130)
    why = compiling.wait() if compiling is not None else None
    if why is not None:
        click.echo(f"note: {why}", err=True)


def _many(
    loaded: LoadedModel, prompts: list[str], sampling: Sampling, raw: bool, batch: int, share: bool, as_json: bool
) -> bool:
    """Answer the prompts of a file; True when Ctrl-C ended it."""
    from rich.console import Console

    from subquad.batch_generation import generate_answers
    from subquad.cli import printing
    from subquad.cli.prefix_printing import print_sharing
    from subquad.progress import progress

    with progress("answering", len(prompts)) as advance:
        done = 0

        def ended(rows: int) -> None:
            nonlocal done
            advance(rows - done, None)
            done = rows

        found = generate_answers(loaded, prompts, sampling, raw=raw, batch=batch, share=share, on_rows=ended)
    if as_json:
        printing.print_json(found.json())
        return found.interrupted
    for number, answer in enumerate(found.texts, 1):
        print(f"[{number}] {answer}")
    sys.stdout.flush()
    codec = loaded.codec
    assert codec is not None
    for start, plan in zip(range(0, len(prompts), batch), found.sharing, strict=False):

        def shown(row: int, first: int, last: int, start: int = start) -> str:
            asked = prompts[start + row]
            return codec.decode((codec.encode(asked) if raw else codec.chat(asked))[first:last])

        print_sharing(Console(stderr=True), plan, shown)
    click.echo(
        f"{sum(map(len, found.tokens))} tokens of {len(prompts)} prompts, first ones after {found.first_token_seconds:.2f} s, "
        f"then {found.tokens_per_second:.1f} tokens/s in all",
        err=True,
    )
    return found.interrupted
