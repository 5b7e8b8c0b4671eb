"""What a user can do about each kind of refusal, one sentence for each."""

from __future__ import annotations

ADVICE = {
    "projection": "Nothing to do: a softmax over experts, tokens or classes has no keys and values to rewrite.",
    "no-product": "If it is attention, compute its scores in the same forward as one product of queries and keys.",
    "no-pairs": "Multiply [batch, head, query, dim] by [batch, head, dim, key], so that scores pair every query with every key.",
    "softmax-axis": "Take the softmax over the key axis, on which the scores of one query lie.",
    "layout": "Keep batch, heads, queries, keys and the head's width on axes of their own between the products.",
    "step": "Use only scales, softcap, additive or boolean masks and biases between the product and the softmax.",
    "scale": "Scale the scores by one positive number, before any mask or sink.",
    "gain": "Scale queries or keys instead of the scores; a factor may depend on the query, not on the key.",
    "mask": "Hide keys with -inf or the type's minimum before the softmax, by a mask that is not computed from the scores.",
    "depends-on-scores": "Compute masks, gates and factors from positions, queries or keys, not from the scores themselves.",
    "soft-fill": "Fill hidden scores with float('-inf') or torch.finfo(dtype).min, so that hidden keys get probability zero.",
    "clamp": "Leave out the clamp, or clamp at torch.finfo(dtype).min; for a bound on scores use a softcap, c·tanh(s/c).",
    "denominator": "Divide the exponentials by their sum, or by one plus their sum for softmax-plus-one.",
    "sink": "Append one logit for each head, constant over batch and queries, after scale and masks.",
    "two-products": "Concatenate the keys before one product, and the values before the product with the probabilities.",
    "guard": "Hide keys before the softmax; after it, set only probabilities of rows without any key to zero, or leave them.",
    "probabilities-used": "Use the attention probabilities once, to weight values; do not return them (output_attentions=False).",
    "mixed-heads": "Keep heads apart until the values are weighted: mixed scores (talking heads) need all heads at once.",
    "no-values": "If it is attention, multiply the probabilities by values over the keys, and by nothing else.",
    "values": "Multiply the probabilities by the values in one product over all keys, and scale or add afterwards.",
    "dropout": "Call model.eval(), or set the attention dropout to zero.",
    "heads": "Repeat key heads and value heads alike, each for a fixed number of neighbouring query heads.",
    "sizes": "Give the model fixed numbers of heads and head sizes; only batch and lengths may vary.",
    "constant": "Nothing to do: the softmax of a constant is a constant.",
    "flex": "Give flex_attention a score_mod and block mask of plain index arithmetic.",
    "whole": "Call torch.nn.functional.scaled_dot_product_attention, or write the products and the softmax out.",
    "defect": "Please report this with the model: it is a defect of subquad and not of your code.",
    "no-softmax": "If the weights should be probabilities, use softmax; any other weighting is left as it is.",
    "linear": "It has no T × T scores, so it is already linear in the length and there is nothing to replace.",
    "nothing": "Capture the module that holds the attention, or check that the example inputs reach it.",
}  # fmt: skip
"""By the kind of a refusal."""


def advice_for(kind: str) -> str:
    """The sentence for a kind; "" when there is none."""
    return ADVICE.get(kind, "")
