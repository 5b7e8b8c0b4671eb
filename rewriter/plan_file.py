"""Read a plan from a file the user names."""

from __future__ import annotations

from pathlib import Path

from subquad.ir.errors import PlanError
from subquad.ir.plan import Plan


def read_plan(path: Path) -> Plan:
    """The plan in a JSON or TOML file, or in an artifact directory; raises PlanError with the file's name."""
    if path.is_dir():
        path = path / "plan.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PlanError(f"the plan {path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan {path} cannot be read: {error}.") from error
    try:
        return Plan.parse(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
