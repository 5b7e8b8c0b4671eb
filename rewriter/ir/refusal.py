"""A reason, as a value, why something in the graph was left as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Refusal:
    """Why a finding was not recognised or not rewritten.

    path: module path of the node, "" for the root.  what: the thing looked at ("softmax", "attention", "linearize:lolcats").
    reason: one sentence a user can act on.  source: file and line of the user's code, "" when unknown.
    """

    path: str
    what: str
    reason: str
    source: str = ""

    def json(self) -> dict[str, str]:
        """The public words of a refusal: path, what, reason, source."""
        return asdict(self)

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"{self.path or '<root>'}: {self.what}: {self.reason}{where}"
