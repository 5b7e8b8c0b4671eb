"""The command group: each command's file is imported only when it is called or listed."""

from __future__ import annotations

import importlib

import click

from subquad.ir.errors import did_you_mean

COMMANDS = ("inspect", "passes", "rewrite", "convert", "verify", "generate", "bench", "emit", "demo", "cache", "env")


class Commands(click.Group):
    """A group whose members are the modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a new user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; None when there is none."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"subquad.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a suggestion for a name that does not exist."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"there is no command {args[0]!r}; {did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"subquad {version('subquad')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def root() -> None:
    """Find attention, decoding loops and shared prefixes in a PyTorch model and replace them by faster equivalents.

    MODEL is a directory in Hugging Face format, a .gguf file, a .pt2 program, path/to/file.py:factory, a hub id, what
    `subquad rewrite` wrote, or `smollm2` for the demo weights.

    Exit status: 0 done, 2 a mistake in what was asked, 3 attention was found but refused and nothing was rewritten.
    """
