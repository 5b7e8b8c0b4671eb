"""Models as people write them: every attention found in three dialects, rewritten within the EXACT contract, the rest refused."""

from __future__ import annotations

import pytest
from written import (
    by_hand,
    by_rows,
    cached,
    counted_masks,
    decoders,
    flex,
    linear_time,
    local,
    not_attention,
    options,
    published,
    relative,
    sets,
    spelled,
    tables,
    torch_modules,
    vision,
    wrapped,
)
from written.case import Case
from written.table import parameters
from written.trial import check

SCHOOLS = {
    "decoders": decoders.CASES,
    "cached": cached.CASES,
    "torch": torch_modules.CASES,
    "vision": vision.CASES,
    "sets": sets.CASES,
    "options": options.CASES,
    "flex": flex.CASES,
    "relative": relative.CASES,
    "local": local.CASES,
    "published": published.CASES,
    "spelled": spelled.CASES,
    "masks": counted_masks.CASES,
    "wrapped": wrapped.CASES,
    "linear time": linear_time.CASES,
    "by rows": by_rows.CASES,
    "tables": tables.CASES,
    "by hand": by_hand.CASES,
    "none": not_attention.CASES,
}
BOTH = frozenset(
    [
        "padding mask and triangle",
        "static cache, one token",
        "patch attention",
        "object queries",
        "memory keys, causal",
        "over streams",
        "router",
    ]
)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(("case", "dialect"), parameters(SCHOOLS, frozenset(["none", "cached"]), BOTH))
def test_written_models(case: Case, dialect: str) -> None:
    if "einops" in case.name:
        pytest.importorskip("einops")
    check(case, dialect)
