"""The errors that the EXACT contract compares, over further calls where few numbers of one call make them up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch

ENOUGH = 64
"""Rows over which a root mean square is an estimate.  The quotient of two such errors that are alike stays below two with
probability 0.71 over one row, 0.97 over 8 and 1 - 5e-8 over 64 (the square is F distributed)."""
DRAWS = 32
Outputs = tuple[torch.Tensor, ...]
"""What one call gives: in float64, by the original, and by the rewritten forward."""


def relative_error(value: torch.Tensor, judge: torch.Tensor) -> float:
    """RMS of the difference over RMS of the judge; NaN where both are NaN counts as equal."""
    difference = (
        (value.double() - judge.double()).nan_to_num(nan=0.0) if _same_nan(value, judge) else torch.tensor(math.inf)
    )
    scale = judge.double().nan_to_num(nan=0.0).square().mean().sqrt()
    return float(difference.square().mean().sqrt() / scale.clamp_min(1e-300))


def _same_nan(value: torch.Tensor, judge: torch.Tensor) -> bool:
    return bool(torch.equal(value.isnan(), judge.isnan()))


def allowed_error(original: float, dtype: torch.dtype) -> float:
    """The bound of the EXACT contract: twice the original's own error plus one unit in the last place of the dtype."""
    return 2 * original + torch.finfo(dtype).eps


def effective_rows(cases: Sequence[Outputs]) -> float:
    """How many rows (all axes but the last) the errors of the original and of the rewritten forward are spread over.

    With s the sum of squared errors of a row this is (Σ s)² / Σ s²: n for n rows that are equally wrong, 1 where one row
    outweighs all others, as the one whose softmax is undecided between two keys does in an ill-conditioned model.  The
    smaller of the two numbers; infinite without errors.
    """
    found = []
    for place in (1, 2):
        squares = torch.cat([_squares(case[place], case[0]) for case in cases])
        spread = squares.square().sum()
        found.append(float(squares.sum().square() / spread) if spread > 0 else float("inf"))
    return min(found)


def _squares(value: torch.Tensor, judge: torch.Tensor) -> torch.Tensor:
    difference = (value.double() - judge.double()).nan_to_num(nan=0.0)
    rows = difference.reshape(-1, difference.shape[-1]) if difference.dim() else difference.reshape(1, 1)
    return rows.square().sum(-1)


def contract_errors(first: Outputs, further: Callable[[int], Sequence[torch.Tensor]]) -> tuple[float, float]:
    """The rewritten and the original's error in one call, or over further ones where that is above the bound of EXACT."""
    judge, before, after = first
    error, own = relative_error(after, judge), relative_error(before, judge)
    return (error, own) if error <= allowed_error(own, before.dtype) else errors_of_many(first, further)


def errors_of_many(first: Outputs, further: Callable[[int], Sequence[torch.Tensor]]) -> tuple[float, float]:
    """The rewritten and the original's error over as many calls as it takes to have enough rows, at most DRAWS.

    first: of the call that there is.  further: of another draw, from 1 on.  Calls that the original does not take, or on
    which the rewritten forward gives way to it, end the series.
    """
    cases = [first]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="subquad ran the original forward")
        for draw in range(1, DRAWS):
            if effective_rows(cases) >= ENOUGH:
                break
            try:
                cases.append(tuple(further(draw)))
            except Exception:
                break
    judge, before, after = (torch.cat([x.flatten() for x in column]) for column in zip(*cases, strict=True))
    return relative_error(after, judge), relative_error(before, judge)
