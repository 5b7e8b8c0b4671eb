"""What recognition does not yet do with the written models: each entry is a strict xfail, and turns red once it is done."""

from __future__ import annotations

MAPPED = "torch.export makes a constant of what a vmap inside a vmap maps, and the capture is refused with the line"
STACKED = "groups repeated by torch.stack are not peeled off once decomposed: as many key heads as query heads"
STATIC = "with every size fixed, heads and blocks behind a pad are told apart by nothing: blocks are taken as heads, as exact"
LOGARITHM = "torch.export fixes the length where a logarithm of it is a number: other lengths run the original"
FEATURES = "with every size fixed, an attention of features to features is one of tokens like any other, and rewritten as exactly"
EMPTIED = (
    "an einsum once decomposed is no product behind which rows of probabilities can be emptied: refused with the line"
)

GAPS: dict[tuple[str, str], str] = {
    **{("mapped over samples and heads", d): MAPPED for d in ("export", "verified", "core")},
    **{("scaled by the length", d): LOGARITHM for d in ("export", "verified", "core")},
    ("pictures before text", "core"): EMPTIED,
    ("the last picture before text", "core"): EMPTIED,
    ("features attend to features", "dynamo"): FEATURES,
    ("padded and folded", "dynamo"): STATIC,
    ("paired rotary, stacked groups", "core"): STACKED,
}
"""By (name of the case, dialect), the reason."""
