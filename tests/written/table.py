"""The written models as parameters of one test: each in each dialect, the quick ones in every run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from written.case import Case
from written.known_gaps import GAPS


def parameters(schools: dict[str, Iterable[Case]], whole: frozenset[str], both: frozenset[str]) -> list[Any]:
    """One parameter (case, dialect) for each; strict xfail where `known_gaps` has it.

    schools: cases by the name of their file.  Every run tries every second quick case of a school, all of those in
    `whole`, and the cases named in `both` in Dynamo's and in the decomposed form too; the others are slow.
    """
    found = []
    for school, cases in schools.items():
        for n, case in enumerate(cases):
            quick = {dialect for dialect in case.quick if school in whole or n % 2 == 0}
            quick |= {"export", "dynamo", "core"} if case.name in both else set()
            for dialect in case.dialects:
                marks = [] if dialect in quick else [pytest.mark.slow]
                if (case.name, dialect) in GAPS:
                    marks.append(pytest.mark.xfail(strict=True, reason=GAPS[case.name, dialect]))
                found.append(pytest.param(case, dialect, marks=marks, id=f"{school}: {case.name} [{dialect}]"))
    return found
