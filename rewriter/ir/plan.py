"""What will be done to a model, as data: ordered steps, the model's fingerprint, JSON and TOML both ways, one hash."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass
from typing import Any

from subquad.ir.errors import PlanError

FORMAT = 1


@dataclass(frozen=True)
class Step:
    """One rewrite of one site: the site's path, the rewrite's name and its knob values."""

    path: str
    rewrite: str
    knobs: tuple[tuple[str, Any], ...] = ()

    def json(self) -> dict[str, Any]:
        """The step as plain data."""
        return {"path": self.path, "rewrite": self.rewrite, "knobs": dict(self.knobs)}


@dataclass(frozen=True)
class Plan:
    """An ordered list of steps made for one model.

    model: fingerprint of the model's parameter names and shapes; a plan applies only to a model that has the same.
    Equal plans hash equally and reproduce the same model.
    """

    steps: tuple[Step, ...]
    model: str

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, as 16 hexadecimal digits."""
        text = json.dumps(self.json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {"format": FORMAT, "model": self.model, "steps": [step.json() for step in self.steps]}

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.json(), indent=1, sort_keys=True)

    def to_toml(self) -> str:
        """The plan as TOML text."""
        lines = [f"format = {FORMAT}", f"model = {json.dumps(self.model)}"]
        for step in self.steps:
            lines += ["", "[[steps]]", f"path = {json.dumps(step.path)}", f"rewrite = {json.dumps(step.rewrite)}"]
            if step.knobs:
                knobs = ", ".join(f"{key} = {json.dumps(value)}" for key, value in step.knobs if value is not None)
                lines.append(f"knobs = {{ {knobs} }}")
        return "\n".join(lines) + "\n"

    @staticmethod
    def parse(text: str) -> Plan:
        """Read a plan from JSON or TOML text; raises PlanError when it is neither or lacks a field."""
        try:
            data = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
        except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
            raise PlanError(f"the plan is neither JSON nor TOML: {error}.") from error
        if data.get("format") != FORMAT:
            raise PlanError(
                f"the plan has format {data.get('format')!r}; this version of subquad reads format {FORMAT}."
            )
        try:
            steps = tuple(
                Step(str(s["path"]), str(s["rewrite"]), tuple(sorted(s.get("knobs", {}).items())))
                for s in data["steps"]
            )
            return Plan(steps, str(data["model"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the plan lacks a field or has one of the wrong kind: {error}.") from error
