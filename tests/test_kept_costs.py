"""Measured costs of passes outlive the process: kept once enough is known, told apart by programs, useless files ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from subquad.kept_costs import ENOUGH, KeptCosts
from subquad.runtime.pass_costs import EXPECTED, WIDTHS, PassCosts
from subquad.runtime.schedule import Call, InputForm, Program, Schedule


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def schedules(width: int) -> dict[str, Schedule]:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.relu, (x,)),))
    program = Program(graph, (0, 0, 0), 0)
    forms = {program.key: (InputForm(torch.float32, (1, width)),)}
    return {"one": Schedule(program, [Call(program, (), (), ())], (), 1, forms)}


def learnt(pairs: int) -> PassCosts:
    costs = PassCosts.measured([1.0, 1.5, 2.0, 3.0, 5.0])
    costs.pairs = pairs
    return costs


def test_costs_come_back_in_another_process_and_count_as_known() -> None:
    KeptCosts(schedules(8)).write("a|16", learnt(ENOUGH))
    found = KeptCosts(schedules(8)).read("a|16")
    assert [found.of(width) for width in WIDTHS] == pytest.approx([1.0, 1.5, 2.0, 3.0, 5.0])
    assert found.pairs == ENOUGH
    for other in (KeptCosts(schedules(9)).read("a|16"), KeptCosts(schedules(8)).read("b|16")):
        assert [other.of(width) for width in WIDTHS] == pytest.approx(EXPECTED)


def test_little_is_not_kept_and_the_same_not_twice() -> None:
    kept = KeptCosts(schedules(8))
    kept.write("a|16", learnt(ENOUGH - 1))
    assert not kept.path("a|16").exists()
    kept.write("a|16", learnt(ENOUGH))
    before = kept.path("a|16").stat().st_ino
    kept.write("a|16", learnt(2 * ENOUGH - 1))
    assert kept.path("a|16").stat().st_ino == before
    kept.write("a|16", learnt(2 * ENOUGH))
    assert [path.suffix for path in kept.path("a|16").parent.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"logarithms": [0, 1]}', '{"logarithms": [0, NaN, 1, 2, 3]}', '{"logarithms": null}']
)
def test_a_file_that_says_nothing_is_ignored(text: str) -> None:
    kept = KeptCosts(schedules(8))
    kept.path("a|16").parent.mkdir(parents=True)
    kept.path("a|16").write_text(text)
    assert kept.read("a|16").of(16) == pytest.approx(EXPECTED[-1])


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    kept = KeptCosts(schedules(8))
    kept.write("a|16", learnt(ENOUGH))
    assert kept.read("a|16").pairs == 0


def test_the_format_is_plain(tmp_path: Path) -> None:
    kept = KeptCosts(schedules(8))
    kept.write("a|16", learnt(ENOUGH))
    assert list(json.loads(kept.path("a|16").read_text())) == ["logarithms"]
    assert kept.path("a|16").parent == tmp_path / "subquad" / "costs"
