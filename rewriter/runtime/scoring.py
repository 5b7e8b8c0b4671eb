"""Score answers: the log-probabilities of the last tokens of rows, of which many begin with the same question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.prefix_tree import sorted_rows
from subquad.runtime.shared_prompt import run_shared
from subquad.runtime.sharing_plan import SharingPlan, plan_sharing


def score_rows(
    engine: DecodeEngine, ids: Tensor, mask: Tensor | None, start: Sequence[int], share: bool,
    on_sharing: Callable[[SharingPlan], None],
) -> list[Tensor]:  # fmt: skip
    """See Decoder.score."""
    if not engine.shares:
        raise GenerationError("the model reads the log-sum-exp of an attention; score its answers by its own forward.")
    batch = ids.shape[0]
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    length = real.sum(1).tolist()
    if len(start) != batch:
        raise GenerationError(f"{len(start)} starts were given for {batch} rows.")
    for row, (first, total) in enumerate(zip(start, length, strict=True)):
        if not 1 <= first < total:
            raise GenerationError(
                f"row {row} of {total} tokens cannot be scored from column {first}; give 1 to {total - 1}."
            )
    own = torch.tensor([total - first + 1 for first, total in zip(start, length, strict=True)])
    plan = SharingPlan(batch, sum(length), sum(length), None, "sharing was turned off")
    if share:
        plan = plan_sharing(ids, mask, own=own)
    try:
        sharing = plan.sharing or sorted_rows(ids.cpu(), real.cpu()).tree(0, 0)
    except ValueError as error:
        raise GenerationError(str(error)) from error
    begin = [first - 1 for first in start]
    logits, _, ran = run_shared(engine, ids, mask, sharing, 0, begin=begin)
    on_sharing(replace(plan, computed=ran))
    order = sharing.order.tolist()
    parts = dict(zip(order, logits.split([length[row] - start[row] for row in order]), strict=True))
    return [_chosen(parts[row], ids[row][real[row]][start[row] :]) for row in range(batch)]


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [n] of tokens [n] by logits [n, V]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
