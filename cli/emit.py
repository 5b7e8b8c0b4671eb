"""`subquad emit OUT -d DIR --target cuda:90`: Triton sources and compiled binaries of a rewritten model."""

from __future__ import annotations

import click

from subquad.cli import options


@click.command()
@click.argument("out")
@click.option("-d", "--directory", required=True, metavar="DIR", help="New directory to write.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="cuda:80, cuda:90, cuda:100 or hip:gfx942; may be repeated.",
)
@options.opening
@options.as_json
def command(
    out: str, directory: str, targets: tuple[str, ...], trust: bool, dtype: str, attention: str | None, as_json: bool
) -> None:
    """Write the Triton kernels that OUT runs on a GPU, and forward kernels that take in the norms and rotary embeddings in
    front of them; with --target also compile them, which needs no GPU.
    """
    from pathlib import Path

    from subquad.cli import printing
    from subquad.kernel_emission import emit_kernels
    from subquad.model_source import open_model

    loaded = open_model(out, trust=trust, dtype=dtype, attention=attention)
    kernels = emit_kernels(loaded.module, Path(directory), targets)
    if as_json:
        printing.print_json({"directory": directory, "kernels": [kernel.json() for kernel in kernels]})
        return
    printing.print_kernels(directory, kernels)
