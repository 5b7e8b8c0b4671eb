"""What recognition does not yet do with the written models: each entry is a strict xfail, and turns red once it is done."""

from __future__ import annotations

MERGED = (
    "heads that the batch comes behind, (h b), or that a repetition merged with it are read as one axis: heads is 1"
)
WEIGHTS = "nn.MultiheadAttention that makes its weights (need_weights=True): the merged axis of batch and heads is read as batch"
INTEGER = "(1 - an integer mask cast to float) times the lowest number stays an additive bias"
LENGTHS = "verification makes up lengths of zero and one, measures rows without keys and rolls an exact rewrite back"
WIDTHS = "a program whose batches are two symbols keeps (8·s1)//s2 as head size, which SDPA's own shape proves to be 8"
NESTED = "the original takes nested tensors and leaves padded rows zero; captured it does not, and the rewrite is rolled back"
STACKED = "groups repeated by torch.stack are not peeled off once decomposed"
EDGES = (
    "of inputs [B, N, N] and [B, N, N, 3] only two axes become symbolic: other N than the example's run the original"
)
HINT = (
    "is_causal=(length > 1) is a number that the capture fixes, and the length with it: other lengths run the original"
)

ALL = ("export", "verified", "dynamo", "core")

GAPS: dict[tuple[str, str], str] = {
    **{("einops repeat, merged heads", d): MERGED for d in ALL},
    **{("heads merged in front of the batch", d): MERGED for d in ALL},
    **{("mha, weights made and dropped", d): WEIGHTS for d in ALL},
    **{("mha, additive triangle, weights", d): WEIGHTS for d in ALL},
    **{("mha, padding, weights", d): WEIGHTS for d in ALL},
    **{("additive padding mask", d): INTEGER for d in ALL},
    ("lengths given", "verified"): LENGTHS,
    ("mha, other widths", "core"): WIDTHS,
    ("decoder", "core"): WIDTHS,
    ("decoder without the hint", "core"): WIDTHS,
    ("encoder, padding, nested tensors allowed", "verified"): NESTED,
    **{
        (f"neighbours {how}", d): EDGES
        for how in ("by a product", "with edge features")
        for d in ("export", "verified")
    },
    ("self, flash", "export"): HINT,
    ("self, flash", "verified"): HINT,
    ("paired rotary, stacked groups", "core"): STACKED,
}
"""By (name of the case, dialect), the reason."""
