"""Rows and columns of a batch that are proved equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prefix:
    """A shared prefix: the first `columns` columns are equal for all rows of each group.

    columns: an integer or the printed symbolic length.  groups: "all rows" or how rows are grouped.
    """

    path: str
    columns: str
    groups: str
    evidence: tuple[str, ...] = field(default=())

    def json(self) -> dict[str, Any]:
        """The public words of a prefix."""
        return {"path": self.path, "columns": self.columns, "groups": self.groups, "evidence": list(self.evidence)}
