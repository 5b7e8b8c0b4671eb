"""What attention gives to a query that sees no key, which differs with how its masks hide."""

from __future__ import annotations

from dataclasses import replace

import sympy

from subquad.ir.mask import KV, EmptyRows, Q
from subquad.ir.site import Bias
from subquad.passes.recognize.score_chain import ScoreReader
from subquad.passes.recognize.scores import MaskSource, Scores


def empty_rows(scores: Scores, guard: EmptyRows | None, safe: bool) -> EmptyRows:
    """The value of rows without keys.

    A sink takes all the probability of such a row.  -inf in a whole row makes it NaN; one low number in a whole row makes it
    the mean of the values.  guard: what the graph does to such rows after the softmax.  safe: the softmax itself gives them
    zeros.
    """
    if scores.predicate == sympy.true or scores.sinks is not None:
        return "zero"
    if guard is not None:
        return guard
    if not scores.infinite:
        return "mean"
    return "zero" if safe else "nan"


def unambiguous(scores: Scores, reader: ScoreReader) -> Scores:
    """The scores with masks that hide by adding or filling a finite number kept as tensors, where several masks meet.

    Two such masks add up to -inf where both hide, so that a row without keys is the mean over the keys that one of them
    hides; no single rule for empty rows says that, and adding the same numbers again does.  Where a query is known to see
    itself, no row is empty and the masks stay conditions.
    """
    finite = [mask for mask in scores.masks if not mask.infinite]
    if len(scores.masks) < 2 or not finite or _sees_itself(scores, reader):
        return scores
    kept = tuple(_tensor(mask, reader) for mask in finite)
    masks = tuple(mask for mask in scores.masks if mask.infinite)
    return replace(scores, masks=masks, biases=(*scores.biases, *kept))


def _sees_itself(scores: Scores, reader: ScoreReader) -> bool:
    frame = reader.frame
    if frame.query is None or str(frame.shape[frame.query]) != str(frame.shape[frame.key]):
        return False
    return scores.predicate.xreplace({KV: Q}) == sympy.true


def _tensor(mask: MaskSource, reader: ScoreReader) -> Bias:
    assert mask.source is not None
    tensor = reader.over_scores(mask.source, mask.met_at)
    if mask.role == "low":
        return Bias(tensor.node, tensor.views)
    return Bias(tensor.node, tensor.views, role=mask.role, fill=mask.fill)
