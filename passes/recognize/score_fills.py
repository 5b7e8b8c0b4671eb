"""Scores that are hidden by being replaced: filled with a low number, or multiplied by zero and lowered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of, shape_of
from subquad.ir.mask import Where
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.chain import Indices
from subquad.passes.recognize.mask_choice import leaves
from subquad.passes.recognize.mask_relation import negate
from subquad.passes.recognize.normalisation import leads_to_exp
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_frame import ScoreFrame
from subquad.passes.recognize.scores import MaskSource, Scores
from subquad.passes.recognize.symbolic_tensor import as_condition, is_boolean, where_zero

Node = torch.fx.Node
ZEROED = "hidden scores are multiplied by zero, and zero is a score like any other"


def filled(reader: ScoreFrame, scores: Scores, node: Node, before: Node, a: dict[str, Any]) -> Scores:
    """The scores where a condition puts one low number in the place of some."""
    if kind(node) == "masked_fill":
        condition, fill, hidden_when = a["mask"], a["value"], True
    elif kind(node) == "index_put":
        condition, fill, hidden_when = _written_where(node, a), a["values"], True
    else:
        condition, fill, hidden_when = a["cond"], a["b"], False
        if a["b"] is before:
            fill, hidden_when = a["a"], True
    value = _hiding(reader.number(fill), node, before)
    seen = as_condition(reader.element(condition, node))
    if hidden_when:
        seen = negate(seen)
    role = "hide" if hidden_when else "keep"
    return masked(reader, scores, node, "fill", seen, value, condition, role)


def zeroed(reader: ScoreFrame, scores: Scores, node: Node, factor: Node) -> Scores | None:
    """The scores times a tensor of zeros and ones, as the first half of s·m + c·(1 - m); None for another factor."""
    shown = one_where(reader.element(factor, node))
    if shown is None or scores.masks or scores.sinks is not None:
        return None
    mask = MaskSource(reader.in_frame(shown, node), factor, node, "keep", 0.0)
    return scores.after(node, "zeroed", zeroed=mask)


def lowered(reader: ScoreFrame, scores: Scores, node: Node, before: Node, other: Any, factor: float) -> Scores:
    """Zeroed scores plus a number that only those get: they are filled with it."""
    assert scores.zeroed is not None
    element = reader.element(other, node)
    added = [value for value in leaves(element) if value != 0]
    seen = reader.in_frame(where_zero(element), node)
    if len(added) != 1 or not added[0].is_number or seen != scores.zeroed.predicate:
        raise NotAttention(ZEROED, scores.zeroed.met_at, "soft-fill")
    value = _hiding(factor * float(added[0]), node, before)
    mask = replace(scores.zeroed, met_at=node, fill=value)
    return scores.after(node, "fill", masks=(*scores.masks, mask), zeroed=None)


def _hiding(value: float | None, node: Node, before: Node) -> float:
    """A number that hides a key when it stands in the place of its score."""
    if value is not None and value <= _lowest(before):
        return value
    what = "a tensor" if value is None else value
    raise NotAttention(
        f"hidden scores are filled with {what}, which is not low enough to hide a key", node, "soft-fill"
    )


def masked(
    reader: ScoreFrame, scores: Scores, node: Node, word: str, seen: sympy.Basic, fill: float, source: Node, role: str
) -> Scores:
    """The scores where a mask met them that shows the keys `seen`, a formula of the indices of `node`."""
    read = MaskSource(reader.in_frame(seen, node), source, node, role, fill)
    return scores.after(node, word, masks=(*scores.masks, read))


def hidden_exponentials(reader: ScoreFrame, scores: Scores, node: Node, place: Indices) -> Scores:
    """The scores of exponentials, at `place` like the scores, that a product or a fill with zero hides keys of."""
    a = arguments(node)
    sides = [side for side in (a.get("x"), a.get("a"), a.get("b")) if leads_to_exp(side)]
    reader.places.update({side: place for side in sides if isinstance(side, Node)} | {node: place})
    if kind(node) in ("masked_fill", "where"):
        kept = kind(node) == "where" and leads_to_exp(a["a"])
        source, value = (a["mask"], a["value"]) if "mask" in a else (a["cond"], a["b"] if kept else a["a"])
        if reader.number(value) != 0:
            raise NotAttention("exponentials are filled with another number than zero", node, "mask")
        seen, role = as_condition(reader.element(source, node)), "keep" if kept else "hide"
        seen = seen if kept else negate(seen)
    else:
        source = a["b"] if a["a"] in reader.places else a["a"]
        shown = one_where(reader.element(source, node))
        if shown is None:
            raise NotAttention("exponentials are multiplied by something that is not zero or one", node, "mask")
        seen, role = shown, "keep"
    return masked(reader, scores, node, "hidden exponentials", seen, float("-inf"), source, role)


def _written_where(node: Node, a: dict[str, Any]) -> Node:
    """The boolean tensor over the last axes that `scores[..., condition] = value` writes at."""
    picks = [pick for pick in a["indices"] if pick is not None]
    leading = len(a["indices"]) - len(picks)
    if (
        len(picks) == 1
        and a["indices"][-1] is picks[0]
        and dtype_of(picks[0]) == torch.bool
        and not a.get("accumulate")
    ):
        if leading + len(shape_of(picks[0]) or ()) == len(shape_of(node) or ()):
            return picks[0]
    raise NotAttention("scores are written at places that no boolean tensor tells", node, "mask")


def _lowest(scores: Node) -> float:
    """What hides a key when it stands in the place of a score: the least number of half precision, else where single
    precision counts in steps of eight, so that scores of that size say nothing.
    """
    return float(torch.finfo(torch.float16).min) if dtype_of(scores) == torch.float16 else -1e8


def one_where(factor: sympy.Basic) -> sympy.Basic | None:
    """The condition under which a factor is one; None when it is anything but one or zero."""
    if is_boolean(factor):
        return factor
    if isinstance(factor, Where) and factor.args[1:] == (1, 0):
        return factor.args[0]
    return negate(factor.args[0]) if isinstance(factor, Where) and factor.args[1:] == (0, 1) else None
