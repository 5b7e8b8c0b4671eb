"""Check what is asked of a generation, and give its tokens step by step though a pass may bring several."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.speculation import Pass


def check_prompt(ids: Tensor, mask: Tensor | None, max_new_tokens: int) -> None:
    """Raises GenerationError for ids, masks or lengths that do not fit.

    ids: int64 [B, T], padded on the left where mask [B, T] is 0.
    """
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise GenerationError(
            f"the prompt has shape {list(ids.shape)} and dtype {ids.dtype}; give token ids [batch, tokens]."
        )
    if mask is not None and (mask.shape != ids.shape or not bool((mask[:, -1] != 0).all())):
        raise GenerationError("the attention mask must have the shape of the ids and be padded on the left.")
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")


def in_step(passes: Iterable[Pass], batch: int) -> Iterator[list[int | None]]:
    """One list a step, the new token of every row or None for one that has ended, each as soon as all rows have theirs."""
    waiting: list[deque[int]] = [deque() for _ in range(batch)]
    ended = [False] * batch
    for one in passes:
        for row, new in zip(waiting, one.emitted, strict=True):
            row.extend(emission.token for emission in new)
        ended = list(one.ended)
        while any(waiting) and all(row or over for row, over in zip(waiting, ended, strict=True)):
            yield [row.popleft() if row else None for row in waiting]
