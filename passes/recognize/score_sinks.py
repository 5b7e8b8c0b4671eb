"""Further logits beside the scores of the keys: sinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.site import ScoreTensor
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.frame import digit
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_frame import ScoreFrame
from subquad.passes.recognize.scores import Scores
from subquad.passes.recognize.symbolic_tensor import is_one, size_of

Node = torch.fx.Node


def padded(reader: ScoreFrame, scores: Scores, node: Node, a: dict[str, Any]) -> Scores:
    """One further column of a number beside the keys: a sink that all heads share."""
    pad, value = list(a["pad"]), reader.number(a["value"] or 0.0)
    last = digit(reader.frame.key) in reader.places[node][-1].free_symbols
    if sorted(pad) != [0, 1] or not last or a["mode"] != "constant" or value is None or scores.sinks is not None:
        raise NotAttention("the scores are padded with something that is not one sink logit a row", node, "sink")
    return scores.after(node, "sink", sinks=value, first_key=size_of(pad[0]))


def beside(reader: ScoreFrame, scores: Scores, logit: Node | float, node: Node, last: Node) -> Scores:
    """The scores of a softmax `node` of `last` that has one more logit in its denominator."""
    if scores.sinks is not None:
        raise NotAttention("the softmax has a further logit beside that of a sink", node, "sink")
    number = reader.number(logit)
    if number is not None:
        return replace(scores, sinks=number)
    shape, key = shape_of(logit) or (), digit(reader.frame.key)
    along = next(n for n, index in enumerate(reader.places[last]) if index == key) - len(reader.places[last])
    if not isinstance(logit, Node) or (len(shape) >= -along and not is_one(shape[along])):
        raise NotAttention("the softmax has further logits that differ from key to key", node, "sink")
    return replace(scores, sinks=_column(reader, logit, last))


def joined(reader: ScoreFrame, scores: Scores, node: Node, before: Node, a: dict[str, Any]) -> Scores:
    """A column of logits beside the keys, whose probability weights no value: a sink."""
    place = reader.places[before]
    along = a["dim"] % len(place)
    parts = list(a["tensors"])
    if len(parts) != 2 or place[along] != digit(reader.frame.key) or scores.sinks is not None:
        raise NotAttention("the scores are concatenated with something that is not one sink logit a row", node, "sink")
    other = parts[1] if parts[0] is before else parts[0]
    shape = list(shape_of(other) or ())
    if not is_one(shape[along]):
        raise NotAttention(
            "the scores are concatenated with those of further keys: keys of two products under one softmax",
            node,
            "two-products",
        )
    first = sympy.S.Zero if parts[0] is before else size_of(shape[along])
    number = reader.number(other)
    sinks: ScoreTensor | float = _column(reader, other, before) if number is None else number
    return scores.after(node, "sink", sinks=sinks, first_key=first)


def _column(reader: ScoreFrame, column: Node, scores: Node) -> ScoreTensor:
    """An appended column of logits: the tensor behind its expansion, [1, H, 1, 1], or one logit a row, [B, H, Tq, 1]."""
    source = column
    while kind(source) in ("expand", "contiguous", "cast"):
        source = arguments(source)["x"]
    shape, place = shape_of(source) or (), reader.places[scores]
    offset = len(place) - len(shape)
    heads = {digit(n) for n in reader.frame.heads}
    per_head = offset >= 0 and all(
        is_one(size) or place[n + offset].free_symbols <= heads for n, size in enumerate(shape)
    )
    views = reader.frame.views(shape, len(place), place) if per_head else None
    return reader.over_scores(column, scores) if views is None else ScoreTensor(source, views)
