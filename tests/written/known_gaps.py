"""What recognition does not yet do with the written models: each entry is a strict xfail, and turns red once it is done."""

from __future__ import annotations

WIDTHS = "a program whose batches are two symbols keeps (8·s1)//s2 as head size, which SDPA's own shape proves to be 8"
EDGES = (
    "of inputs [B, N, N] and [B, N, N, 3] only two axes become symbolic: other N than the example's run the original"
)
SUMMED = "a row sum by einsum is read where unsqueeze puts its axis back, not where [..., None] or core ATen does"
MAPPED = "torch.export makes a constant of what a vmap inside a vmap maps, and the capture is refused with the line"
STACKED = "groups repeated by torch.stack are not peeled off once decomposed: as many key heads as query heads"

GAPS: dict[tuple[str, str], str] = {
    ("mha, other widths", "core"): WIDTHS,
    ("decoder", "core"): WIDTHS,
    ("decoder without the hint", "core"): WIDTHS,
    **{
        (f"neighbours {how}", d): EDGES
        for how in ("by a product", "with edge features")
        for d in ("export", "verified")
    },
    **{("mapped over samples and heads", d): MAPPED for d in ("export", "verified", "core")},
    **{("sum by einsum", d): SUMMED for d in ("dynamo", "core")},
    ("paired rotary, stacked groups", "core"): STACKED,
}
"""By (name of the case, dialect), the reason."""
