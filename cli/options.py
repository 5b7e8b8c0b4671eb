"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
trust = click.option(
    "--trust", is_flag=True, help="Open sources that are code: .pt2, file.py:factory, own modelling code."
)
dtype = click.option(
    "--dtype", default="auto", metavar="auto|fp32|bf16", help="Type of the weights; auto is as stored."
)
attention = click.option(
    "--attention", type=click.Choice(["eager", "sdpa"]), help="Spelling of attention that a Hugging Face model uses."
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing output, which stays whole until then.")
output = click.option("-o", "--output", "out", required=True, metavar="OUT", help="Directory to write.")


def opening(function: F) -> F:
    """The options of every command that opens a model: --trust, --dtype, --attention."""
    return trust(dtype(attention(function)))
