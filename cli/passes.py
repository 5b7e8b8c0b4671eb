"""`subquad passes [NAME]`: the passes that exist, their contracts, knobs and papers."""

from __future__ import annotations

from typing import Any

import click

from subquad.cli import options


@click.command()
@click.argument("name", required=False)
@options.as_json
def command(name: str | None, as_json: bool) -> None:
    """List the passes, or describe one."""
    import subquad
    from subquad.cli import printing
    from subquad.ir.errors import PassError, did_you_mean

    known: dict[str, Any] = {entry.name: entry.json() for entry in subquad.list_passes()}
    if name is not None and name not in known:
        family = {key: value for key, value in known.items() if key.split(":")[0] == name}
        if not family:
            raise PassError(f"there is no pass {name!r}; {did_you_mean(name, known)}")
        known = family
    elif name is not None:
        known = {name: known[name]}
    if as_json:
        printing.print_json({"passes": list(known.values())})
        return
    rows = [[p["name"], p["contract"], p["matches"], p["paper"]] for p in known.values()]
    printing.print_table("Passes", ["name", "contract", "matches", "paper"], rows)
    if name is not None:
        knobs = [[p["name"], knob, default] for p in known.values() for knob, default in p["knobs"].items()]
        printing.print_table("Knobs", ["pass", "knob", "default"], knobs)
