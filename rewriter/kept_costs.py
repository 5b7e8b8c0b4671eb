"""What passes of a compiled decoder were measured to cost, kept in the private cache, so that the next process need not probe."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from subquad.compilation import machine_key
from subquad.ir.errors import SubquadError
from subquad.private_cache import cache_root
from subquad.runtime.pass_costs import WIDTHS, PassCosts
from subquad.runtime.schedule import Schedule

FORMAT = 1
ENOUGH = 24
"""Pairs of passes from which on costs are worth keeping; kept again when there are twice as many."""
LARGEST = math.log(64)
"""Bound of a logarithm that a file may hold."""


class KeptCosts:
    """The costs of one decoder's passes on this machine, with these threads; `label` says who drafts in them.

    A file that cannot be read or written, or holds anything else, is as good as none.
    """

    def __init__(self, schedules: Mapping[str, Schedule]) -> None:
        """schedules: of a decoder whose programs are compiled, so that their forms are known."""
        self.schedules = schedules
        self.kept: dict[str, int] = {}

    def path(self, label: str) -> Path:
        """The file: its name says programs, sizes of weights, versions, processor and threads."""
        described = [
            [name, [[call.program.key, [list(map(str, form.sizes)) for form in schedule.forms.get(call.program.key, ())]]
                    for call in schedule.calls]]
            for name, schedule in sorted(self.schedules.items())
        ]  # fmt: skip
        text = json.dumps([FORMAT, label, described, machine_key()])
        return cache_root() / "costs" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def read(self, label: str) -> PassCosts:
        """What earlier processes measured; what is expected where none did."""
        try:
            found = json.loads(self.path(label).read_text())["logarithms"]
            costs = [float(value) for value in found]
        except (OSError, SubquadError, ValueError, KeyError, TypeError):
            return PassCosts()
        if len(costs) != len(WIDTHS) or not all(abs(value) <= LARGEST for value in costs):
            return PassCosts()
        return PassCosts(costs, pairs=ENOUGH)

    def write(self, label: str, costs: PassCosts) -> None:
        """Keep the costs when enough was learnt since they were last kept."""
        if costs.pairs < max(ENOUGH, 2 * self.kept.get(label, 0)):
            return
        self.kept[label] = costs.pairs
        try:
            path = self.path(label)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"logarithms": costs.logarithms}, file)
                os.replace(fresh, path)
            except OSError:
                os.unlink(fresh)
        except (OSError, SubquadError):
            return
