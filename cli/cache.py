"""`subquad cache`: where the private cache is, what it holds, and emptying it."""

from __future__ import annotations

import click

from subquad.cli import options


@click.command()
@click.option("--clear", is_flag=True, help="Remove everything, or only NAME.")
@click.argument("name", required=False)
@options.as_json
def command(clear: bool, name: str | None, as_json: bool) -> None:
    """Show the private cache (compiled code, kernels, demo weights), or clear it."""
    from subquad import private_cache
    from subquad.cli import printing
    from subquad.ir.errors import SubquadError

    if name is not None and not clear:
        raise SubquadError(f"give --clear to remove the cache entry {name!r}.")
    freed = private_cache.clear_cache(name) if clear else 0
    entries = private_cache.cache_entries()
    root = str(private_cache.cache_root())
    if as_json:
        printing.print_json({"path": root, "entries": entries, "freed": freed})
        return
    rows = [[e["name"], e["files"], f"{int(str(e['bytes'])) / 2**20:.1f}"] for e in entries]
    printing.print_table(root, ["entry", "#files", "#MiB"], rows)
    if not rows:
        printing.console().print(f"{root} is empty", markup=False)
    if clear:
        printing.console().print(f"freed {freed / 2**20:.1f} MiB", markup=False)
