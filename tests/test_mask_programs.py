"""The mask algebra on random programs: every tensor of every graph equals its formula at every element, size and value."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mask_formulas import disagreement
from mask_programs import Program, programs, traced

from subquad.passes.recognize import mask_arithmetic, mask_views

deterministic = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip


def _check(examples: int, together: int) -> None:
    """Formulas are compared in every example; most tensors must have one, so that there is something to compare."""
    proved: list[int] = []

    @settings(deterministic, max_examples=examples)
    @given(st.lists(programs, min_size=together, max_size=together))
    def run(what: list[Program]) -> None:
        found, count = disagreement(traced(what))
        assert not found, found
        proved.append(count)

    run()
    assert sum(proved) > len(proved)


def test_every_tensor_of_a_random_program_equals_its_formula() -> None:
    _check(15, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_tensor_of_many_random_programs_equals_its_formula() -> None:
    _check(400, 6)


WRONG = {
    "sub": (lambda a, b: a - b + 1, ("ge", ("sub", ("rows", ("range",)), ("columns", ("range",))), 0)),
    "floordiv": (lambda a, b: mask_arithmetic.FloorDiv(a + 1, b), ("eq", ("rows", ("floordiv", ("range",), 3)), 1)),
    "mod": (lambda a, b: sympy.Mod(a, b + 1), ("eq", ("columns", ("mod", ("shift", ("ids",), -2), 3)), 1)),
    "maximum": (sympy.Min, ("gt", ("rows", ("maximum", ("ids",), ("range",))), 2)),
}


@pytest.mark.parametrize("operation", WRONG)
def test_a_wrong_rule_is_noticed(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, program = WRONG[operation]
    graph = traced([program])
    assert disagreement(graph)[0] == ""
    monkeypatch.setitem(mask_arithmetic.OPERATIONS, operation, wrong)
    assert disagreement(graph)[0]


def test_a_view_read_one_place_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = traced([("ge", ("columns", ("write", ("tail", ("ids",), 2), 2, 3)), 1)])
    assert disagreement(graph)[0] == ""
    right = mask_views.first_index
    monkeypatch.setattr(mask_views, "first_index", lambda *args: right(*args) + 1)
    assert disagreement(graph)[0]
