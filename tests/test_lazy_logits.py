"""Logits without memory behave like the tensor they stand for, and compute only the rows that are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad.runtime.lazy_logits import LazyLogits

B, T, V = 2, 5, 7


def lazy(full: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """The lazy form of a tensor, and the list of what was computed of it."""
    read: list[Any] = []

    def row(index: int) -> torch.Tensor:
        read.append(index)
        return full[:, index].clone()

    def whole() -> torch.Tensor:
        read.append("all")
        return full.clone()

    return LazyLogits(row, whole, full.shape, full.dtype, full.device), read


ROWS: dict[str, Callable[[Any], Any]] = {
    "last": lambda x: x[:, -1],
    "last with ends": lambda x: x[:, -1, :],
    "kept axis": lambda x: x[:, -1:, :],
    "kept axis, short": lambda x: x[:, -1:],
    "list": lambda x: x[:, [-1], :],
    "of one row of the batch": lambda x: x[0, -1],
    "in two steps": lambda x: x[1][-1],
    "columns": lambda x: x[:, -1, 2:5],
    "dots": lambda x: x[..., -1, :],
    "positive": lambda x: x[:, T - 1],
    "tensor place": lambda x: x[:, torch.tensor(3)],
    "select": lambda x: x.select(1, -1),
    "cast first": lambda x: x.float()[:, -1],
    "double first": lambda x: x.double()[:, -1],
    "cooled first": lambda x: (x / 0.7)[:, -1],
    "cooled, detached, cast": lambda x: (2 * x.detach()).to(torch.float64)[:, -1],
    "sizes": lambda x: torch.tensor([x.shape[1], x.size(-1), x.dim(), len(x)]),
}


@pytest.mark.parametrize("name", ROWS)
def test_reading_a_row_computes_that_row(name: str) -> None:
    full = torch.randn(B, T, V)
    x, read = lazy(full)
    assert torch.equal(ROWS[name](x), ROWS[name](full))
    assert "all" not in read
    assert len(read) <= 1


ALL: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: x.mean(1),
    "two rows": lambda x: x[:, -2:],
    "transposed": lambda x: x.transpose(1, 2)[..., -1],
    "new axis": lambda x: x[:, None, -1],
    "mask": lambda x: x[:, torch.tensor([True, False, False, False, True])],
    "softmax": lambda x: x.softmax(-1)[:, -1],
    "sum of two": lambda x: (x + torch.ones(V))[:, -1],
    "out of range": lambda x: x[:, T],
    "flattened": lambda x: x.reshape(-1, V)[-1],
    "gathered": lambda x: x[torch.arange(B), torch.tensor([1, 3])],
    "stacked": lambda x: torch.cat([x, x], 1)[:, -1],
}


@pytest.mark.parametrize("name", ALL)
def test_everything_else_is_the_whole(name: str) -> None:
    full = torch.randn(B, T, V)
    x, read = lazy(full)
    try:
        want = ALL[name](full)
    except IndexError:
        with pytest.raises(IndexError):
            ALL[name](x)
        return
    assert torch.equal(ALL[name](x), want)
    assert read == ["all"]


def row_then_row(x: Any) -> Any:
    x[:, -1][:, 2] = -9.0
    return x[:, -1]


def all_then_row(x: Any) -> Any:
    x[:, -1, 3] = -9.0
    x /= 2
    return x[:, -1]


def row_then_all(x: Any) -> Any:
    row = x[:, -1]
    row[row < 0] = -torch.inf
    return x.clone()


def copy_then_change(x: Any) -> Any:
    cooled = x / 0.5
    x[:, -1][:] = 0.0
    return torch.stack([cooled[:, -1], x[:, -1]])


def copy_then_change_all(x: Any) -> Any:
    cooled = x * 0.5
    x.fill_(1.0)
    return torch.stack([cooled[:, -1], x[:, -1]])


def change_then_copy(x: Any) -> Any:
    x[:, -1].mul_(3)
    return (x / 2)[:, -1]


def picked_and_changed(x: Any) -> Any:
    one = x[0]
    one[-1][0] = 4.0
    return x[:, -1]


@pytest.mark.parametrize(
    "program",
    [
        row_then_row,
        all_then_row,
        row_then_all,
        copy_then_change,
        copy_then_change_all,
        change_then_copy,
        picked_and_changed,
    ],
)
def test_what_is_written_stays_written(program: Callable[[Any], Any]) -> None:
    full = torch.randn(B, T, V)
    x, _ = lazy(full)
    assert torch.equal(program(x), program(full.clone()))
