"""The EXACT contract as a test: errors against a run of the original in which every float is a double."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

SHORT = {torch.float32, torch.float16, torch.bfloat16}


class _Widened(TorchFunctionMode):
    """Every cast to, and every tensor made of, a shorter float becomes a double."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return torch.Tensor.double(args[0])
        args, kwargs = pytree.tree_map_only(
            torch.dtype, lambda d: torch.float64 if d in SHORT else d, (args, kwargs or {})
        )
        return function(*args, **kwargs)


@contextmanager
def _doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Widened():
            yield
    finally:
        torch.set_default_dtype(before)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _error(value: torch.Tensor, judge: torch.Tensor) -> float:
    """RMS of the difference over RMS of the judge where neither is NaN."""
    kept = ~judge.isnan()
    difference = (value.double() - judge)[kept]
    return float(difference.square().mean().sqrt() / judge[kept].square().mean().sqrt().clamp_min(1e-300))


def assert_within_contract(
    run: Callable[..., Any], plain: nn.Module, judge: nn.Module, inputs: tuple[Any, ...]
) -> None:
    """Every floating output of `run` errs at most twice as much as the original's plus one unit in the last place.

    plain: the original.  judge: the same in its own dtype; this function makes it double.
    """
    with torch.no_grad():
        got, own = (pytree.tree_leaves(f(*pytree.tree_map(_copy, inputs))) for f in (run, plain))
    with _doubles():
        want = pytree.tree_leaves(judge.double()(*pytree.tree_map(_double, inputs)))
    assert len(got) == len(own) == len(want)
    for mine, its, true in zip(got, own, want, strict=True):
        if not isinstance(true, torch.Tensor):
            assert mine == its
            continue
        assert mine.shape == its.shape, f"WRONG shape {tuple(mine.shape)}, not {tuple(its.shape)}"
        assert mine.dtype == its.dtype, f"WRONG dtype {mine.dtype}, not {its.dtype}"
        assert torch.equal(mine.isnan(), its.isnan()), "WRONG: NaN in other places than the original's"
        if not its.is_floating_point():
            assert torch.equal(mine, its), "WRONG integers"
            continue
        allowed = 2 * _error(its, true) + torch.finfo(its.dtype).eps
        error = _error(mine, true)
        assert error <= allowed, f"WRONG: error {error:.3g}, allowed {allowed:.3g}"


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
