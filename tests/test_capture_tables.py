"""Plain attributes that a forward assigns: tables of sizes are made in the graph, what else it keeps is state and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from written.tables import Cached, ForEach, OfThisLength, Registered, TableDecoder, Unnamed

from subquad.capture import capture
from subquad.capture_tables import attributes_kept, data_behind, tables_of
from subquad.ir.errors import CaptureError

X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("turn", "before"),
    [(OfThisLength, 0), (OfThisLength, 9), (Unnamed, 5), (Registered, 0), (Registered, 9), (ForEach, 9), (Cached, 0)],
)
def test_every_length_is_captured_and_the_attributes_stay(turn: Any, before: int) -> None:
    model = TableDecoder(turn, before).eval()

    def held() -> list[Any]:
        return [
            [{**vars(one), "tables": None}, dict(one._buffers), {**vars(one).get("tables", {})}] for one in model.turns
        ]

    at_first = held()
    captured = capture(model, (X,))
    assert held() == at_first
    assert captured.guards.sizes == {"x": (None, None, 32)}
    assert captured.guards.conditions == ()
    assert turn is Cached or any("depends on sizes alone" in note and "`turns.0." in note for note in captured.notes)
    for time in (3, 9, 17):
        x = torch.randn(1, time, 32)
        torch.testing.assert_close(captured.graph(x)[0], model(x))


class Branching(TableDecoder):
    """Asks first whether anything is padding, as fair-esm does."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = super().forward(x)
        return x.masked_fill(padding[..., None], 0) if padding.any() else x


@pytest.mark.parametrize("before", [0, 9])
def test_a_forward_that_also_branches_on_values_is_captured_for_every_length(before: int) -> None:
    model = Branching(OfThisLength).eval()
    if before:
        model(X, torch.zeros(2, before, dtype=torch.bool))
    held = [dict(vars(one)) for one in model.turns]
    captured = capture(model, (X, torch.zeros(2, 9, dtype=torch.bool)))
    assert [dict(vars(one)) for one in model.turns] == held
    assert captured.guards.sizes == {"x": (None, None, 32), "padding": (None, None)}
    x, none = torch.randn(1, 5, 32), torch.zeros(1, 5, dtype=torch.bool)
    torch.testing.assert_close(captured.graph(x, none)[0], model(x, none))
    assert captured.guards.broken([x, ~none]) is not None


class State(nn.Module):
    """keep: what is done to the attribute `kept`, given its value and the input, at every call."""

    def __init__(self, keep: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.project = nn.Linear(32, 32)
        self.keep, self.kept = keep, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        self.kept = self.keep(self.kept, x)
        return x + self.kept


STATES = {
    "a running mean": lambda kept, x: x.mean((0, 1)) if kept is None else 0.9 * kept + 0.1 * x.mean((0, 1)),
    "the last input": lambda kept, x: x.mean((0, 1)) + (0 if kept is None else kept),
    "a count of calls": lambda kept, x: torch.zeros(x.shape[1], 1) if kept is None else kept[: x.shape[1]].sum() + 1,
    "the first length": lambda kept, x: torch.tensor(1.0 / x.shape[1]) if kept is None else kept,
    "of the batch's content": lambda kept, x: torch.zeros_like(x[:1]) + x[:1] * 0,
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("before", [False, True])
def test_state_is_refused(kind: str, before: bool) -> None:
    model = State(STATES[kind]).eval()
    if before:
        with torch.no_grad():
            model(X)
    if kind == "the first length" and before:
        assert "x.shape[1]" not in str(capture(model, (X,)).notes)  # a constant as long as nobody empties it
        return
    with pytest.raises(CaptureError, match="`kept`"):
        capture(model, (X,))


class Shown(TableDecoder):
    """Keeps its last output for whoever wants to look at it."""

    def forward(self, x: Tensor) -> Tensor:
        self.shown = super().forward(x)
        return self.shown


def test_what_a_model_keeps_to_be_looked_at_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"`shown`.*return it"):
        capture(Shown(OfThisLength).eval(), (X,))


def test_tables_are_found_by_calls_and_the_attributes_stay() -> None:
    model = TableDecoder(OfThisLength, 4).eval()

    def call(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [model(x)]

    with attributes_kept(model) as kept:
        tables = tables_of(model, call, X, torch.cat([X, X[:, -1:]], 1), X.flip(1))
        assert tables is not None
        assert set(tables.names) == {f"turns.{n}.{name}" for n in range(2) for name in ("length", "cos", "sin")}
        assert list(kept.changed()) == []
    assert tables_of(nn.Linear(32, 32), lambda x: [x], X, X, X) is None


def test_a_dictionary_of_results_is_state() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.seen = nn.Linear(32, 32), {}

        def forward(self, x: Tensor) -> Tensor:
            x = self.project(x)
            return x + self.seen.setdefault("first", x.mean((0, 1)))

    with pytest.raises(CaptureError, match="`seen"):
        capture(Remembers().eval(), (X,))


def test_sizes_are_no_data() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return torch.arange(x.shape[1]), x.new_zeros(x.shape[1]), torch.ones_like(x) * 2, x * 0, x.exp().sum()

    outputs = capture(Sized(), (X,)).graph.graph.output_node().args[0]
    assert [data_behind([one]) for one in outputs] == [None, None, None, "x", "x"]
