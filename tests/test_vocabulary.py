"""One kind for every spelling of an operation, also where only its arguments tell what it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from subquad.ir.vocabulary import KINDS, arguments, kind

BOTH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "function": lambda x, y: torch.max(x, y),
    "named": lambda x, y: torch.max(x, other=y),
    "method": lambda x, y: x.max(y),
    "least": lambda x, y: x.min(y),
}
ONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of a row": lambda x, y: x.max(dim=-1, keepdim=True).values + y,
    "by position": lambda x, y: torch.max(x, -1)[0] + y.sum(),
    "of all": lambda x, y: x.max() + y,
    "least": lambda x, y: x.min(-1)[0] + y.sum(),
}


NUMPY: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: torch.sum(x, axis=1, keepdims=True),
    "cat": lambda x: torch.cat([x, x], axis=1),
    "softmax": lambda x: x.softmax(axis=1),
    "cumsum": lambda x: torch.cumsum(x, axis=1),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMPY)
def test_an_axis_by_its_name_in_numpy_is_the_axis(name: str) -> None:
    class Whole(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NUMPY[name](x)

    node = next(n for n in torch.fx.symbolic_trace(Whole()).graph.nodes if kind(n))
    found = arguments(node)
    assert (found["dim"], found.get("keepdim", True)) == (1, True)


def kinds(function: Callable[[Tensor, Tensor], Tensor]) -> list[str]:
    """The kinds of max and min in a traced function and in its core-ATen program; their arguments are read too."""

    class Whole(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(x, y)

    program = torch.export.export(Whole(), (torch.ones(3, 3), torch.ones(3, 3)), strict=False)
    found = []
    for graph in (torch.fx.symbolic_trace(Whole()).graph, program.graph):
        for node in graph.nodes:
            if kind(node) in ("maximum", "minimum", "extreme"):
                assert arguments(node)
                found.append(kind(node))
    return found


@pytest.mark.parametrize("name", BOTH)
def test_two_tensors_are_compared(name: str) -> None:
    assert set(kinds(BOTH[name])) <= {"maximum", "minimum"}
    assert len(kinds(BOTH[name])) == 2


@pytest.mark.parametrize("name", ONE)
def test_one_tensor_is_reduced(name: str) -> None:
    assert kinds(ONE[name]) == ["extreme", "extreme"]


def test_every_overload_of_a_kind_has_its_arguments() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for known in KINDS:
        for packet in (getattr(torch.ops.aten, name) for name in known.aten if hasattr(torch.ops.aten, name)):
            for name in packet.overloads():
                overload = getattr(packet, name)
                node = graph.call_function(overload, (x,) * len(overload._schema.arguments))
                if kind(node) not in ("", "assertion"):
                    assert arguments(node), overload


def test_axes_are_exchanged_under_any_name() -> None:
    class Whole(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.swapaxes(x, axis0=0, axis1=-1) + torch.swapdims(x, 0, -1) + x.swapaxes(0, -1)

    program = torch.export.export(Whole(), (torch.ones(3, 3),), strict=False)
    for graph in (torch.fx.symbolic_trace(Whole()).graph, program.graph):
        found = [arguments(node) for node in graph.nodes if kind(node) == "transpose"]
        assert [(a["dim0"], a["dim1"]) for a in found] == [(0, -1)] * 3
