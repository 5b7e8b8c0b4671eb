"""What was found, done, refused and measured, as one value with JSON and a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from subquad.ir.cost import Declined
from subquad.ir.loop import Loop
from subquad.ir.plan import Plan
from subquad.ir.prefix import Prefix
from subquad.ir.refusal import Refusal
from subquad.ir.site import Site


@dataclass(frozen=True)
class Measurement:
    """One rung of the verification ladder.

    rung: "lint" | "site" | "logits" | "tokens".  path: the site, or "" for the whole model.  error and allowed: RMS error
    against the float64 run and the bound it is held to; for approximate rewrites allowed is None.  passed: the verdict.
    detail: sizes, paddings and dtypes tried.
    """

    rung: str
    path: str
    error: float
    allowed: float | None
    passed: bool
    detail: str = ""

    def json(self) -> dict[str, Any]:
        """The public words of a measurement."""
        return {
            "rung": self.rung,
            "path": self.path,
            "error": self.error,
            "allowed": self.allowed,
            "passed": self.passed,
            "detail": self.detail,
        }


@dataclass
class Report:
    """The account of one inspect, rewrite or verify.

    sites, loops, prefixes, refusals: what was found.  applied: "path: pass" per replaced site.  refused: sites a pass did
    not admit.  declined: sites for which no pass was named and an exact one is predicted to gain nothing.
    nearest: what comes closest to attention when no site was found.  rolled_back: rewrites undone because they broke their
    contract.  verification: measured errors.  seconds: wall time by stage.  conversion: perplexity and KL to the original
    before and after each stage of training.
    """

    sites: list[Site] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    prefixes: list[Prefix] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    nearest: Refusal | None = None
    plan: Plan | None = None
    applied: list[dict[str, Any]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    rolled_back: list[Refusal] = field(default_factory=list)
    verification: list[Measurement] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    conversion: list[dict[str, Any]] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        """Copies of a module share the account of how it came to be."""
        return self

    @property
    def plan_hash(self) -> str | None:
        """The hash of the plan, None when nothing was planned."""
        return None if self.plan is None else self.plan.hash

    def json(self) -> dict[str, Any]:
        """Everything as plain data under the public words."""
        return {
            "sites": [site.json() for site in self.sites],
            "loops": [loop.json() for loop in self.loops],
            "prefixes": [prefix.json() for prefix in self.prefixes],
            "refusals": [refusal.json() for refusal in self.refusals],
            "nearest_miss": None if self.nearest is None else self.nearest.json(),
            "plan_hash": self.plan_hash,
            "applied": list(self.applied),
            "refused": [refusal.json() for refusal in self.refused],
            "declined": [site.json() for site in self.declined],
            "rolled_back": [refusal.json() for refusal in self.rolled_back],
            "verification": [measurement.json() for measurement in self.verification],
            "seconds": {key: round(value, 4) for key, value in self.seconds.items()},
            "notes": list(self.notes),
            "conversion": list(self.conversion),
        }
