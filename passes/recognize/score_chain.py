"""Interpret the operations between a score product and its softmax: scale, gain, softcap, biases, masks, sinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.site import Bias, Gain
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.chain import Chain
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_fills import ZEROED, filled, lowered, masked, zeroed
from subquad.passes.recognize.score_frame import ScoreFrame
from subquad.passes.recognize.score_path import VIEWS
from subquad.passes.recognize.score_sinks import joined, padded
from subquad.passes.recognize.scores import LOW, Scores
from subquad.passes.recognize.symbolic_tensor import is_hard, visible

Node = torch.fx.Node
ROW_STEPS = frozenset(
    ["contiguous", "cast", "unsqueeze", "squeeze", "clamp", "nan_to_num", "getitem", "masked_fill", "relu"]
)
REDUCTIONS = frozenset(["amax", "extreme", "mean", "logsumexp"])
DROPOUT = "dropout on the scores in training mode cannot be kept by a rewrite; call eval()"


def read_scores(chain: Chain, algebra: MaskAlgebra) -> Scores:
    """Interpret a chain; raises NotAttention with the reason when a step of it is not understood."""
    return ScoreReader(chain.frame, chain.places, algebra).read(chain)


class ScoreReader(ScoreFrame):
    """Reads one operation after the other."""

    def read(self, chain: Chain) -> Scores:
        """The scores after the whole chain."""
        first = chain.nodes[0]
        scores = Scores(first, scale=chain.product.alpha, passed=(first,), words=(kind(first),))
        if chain.product.addend is not None:
            scores = self._plus(scores, first, chain.product.addend, chain.product.beta)
        for before, node in zip(chain.nodes, chain.nodes[1:], strict=False):
            scores = self._step(scores, node, before)
        if scores.zeroed is not None:
            raise NotAttention(ZEROED, scores.zeroed.met_at, "soft-fill")
        return scores

    def _step(self, scores: Scores, node: Node, before: Node) -> Scores:
        name = kind(node)
        a = arguments(node)
        if name == "cast" or name in VIEWS:
            return scores.after(node, name)
        if scores.zeroed is not None and name not in ("add", "sub"):
            raise NotAttention(ZEROED, scores.zeroed.met_at, "soft-fill")
        if name == "dropout":
            if drops_out(a):
                raise NotAttention(DROPOUT, node, "dropout")
            return scores.after(node, "dropout(0)")
        if name == "tanh":
            if not scores.is_bare:
                raise NotAttention("a tanh after a mask, a bias or another tanh is not a softcap", node, "step")
            return scores.after(node, "tanh", softcap=1.0)
        if name == "neg":
            return self.times(scores, node, -1.0, "neg")
        if name in ("mul", "div"):
            return self._scaled(scores, node, before, a)
        if name in ("add", "sub", "rsub"):
            return self._added(scores, node, before, a)
        if name in ("where", "masked_fill", "index_put"):
            return filled(self, scores, node, before, a)
        if name in ("maximum", "clamp"):
            return self._clamped(scores, node, before, a)
        if name == "cat":
            return joined(self, scores, node, before, a)
        if name == "pad":
            return padded(self, scores, node, a)
        raise NotAttention(
            f"`{name or node.target}` between the scores and the softmax is not understood", node, "step"
        )

    def times(self, scores: Scores, node: Node, factor: float, word: str) -> Scores:
        """The scores times a fixed number."""
        if factor == 0:
            raise NotAttention("the scores are multiplied or divided by zero", node, "scale")
        if (scores.predicate != sympy.true or scores.softcap is not None) and factor <= 0:
            raise NotAttention("masked or capped scores are multiplied by a number that is not positive", node, "scale")
        if scores.sinks is not None:
            raise NotAttention("the scores are scaled after a sink logit was appended", node, "scale")
        return scores.after(
            node, word, scale=scores.scale * factor,
            softcap=None if scores.softcap is None else scores.softcap * factor,
            biases=tuple(replace(b, factor=b.factor * factor) for b in scores.biases),
        )  # fmt: skip

    def _scaled(self, scores: Scores, node: Node, before: Node, a: dict[str, Any]) -> Scores:
        divided = kind(node) == "div"
        if divided and (a["a"] is not before or a.get("rounding_mode") is not None):
            raise NotAttention("the scores are a divisor", node, "scale")
        other = a["b"] if a["a"] is before else a["a"]
        factor = self.number(other)
        if factor is None:
            return self._gained(scores, node, other, divided)
        if factor == 0:
            raise NotAttention("the scores are multiplied or divided by zero", node, "scale")
        return self.times(scores, node, 1 / factor if divided else factor, kind(node))

    def _gained(self, scores: Scores, node: Node, other: Any, divided: bool) -> Scores:
        if not isinstance(other, Node) or shape_of(other) is None:
            raise NotAttention(f"the scores are multiplied by {other}", node, "scale")
        if self.varies_with_key(other, node):
            found = None if divided else zeroed(self, scores, node, other)
            if found is not None:
                return found
            raise NotAttention("the scores are multiplied by a tensor that differs from key to key", node, "gain")
        if scores.gain is not None or not scores.is_bare:
            raise NotAttention(
                "masked, capped or biased scores are multiplied by a tensor, not by one number", node, "gain"
            )
        tensor = self.over_scores(other, node)
        return scores.after(node, f"{kind(node)} by a tensor", gain=Gain(tensor.node, tensor.views, divided))

    def _added(self, scores: Scores, node: Node, before: Node, a: dict[str, Any]) -> Scores:
        negative, less = kind(node) != "add", a["a"] if kind(node) == "rsub" else a["b"]
        other = a["b"] if a["a"] is before else a["a"]
        sign = (-1.0 if negative else 1.0) * float(a.get("alpha", 1))
        if negative and less is before:
            if scores.zeroed is not None:
                raise NotAttention(ZEROED, scores.zeroed.met_at, "soft-fill")
            scores, sign, negative = self.times(scores, node, sign, "subtracted"), 1.0, False
        if scores.zeroed is not None:
            return lowered(self, scores, node, before, other, sign)
        if isinstance(other, Node) and self._is_of_row(other, node):
            return scores.after(node, "minus the row's maximum" if negative else "plus a number of the row")
        return self._plus(scores, node, other, sign)

    def _plus(self, scores: Scores, node: Node, other: Any, factor: float) -> Scores:
        number = self.number(other)
        if number is not None and abs(number) < 1e30:
            return scores.after(node, "shift")
        if not isinstance(other, Node):
            raise NotAttention(f"{other} is added to the scores", node, "step")
        read = visible(self.element(other, node)) if factor > 0 else None
        if read is None:
            if scores.sinks is not None:
                raise NotAttention("a bias is added to the scores after a sink logit was appended", node, "step")
            if factor > 0 and (split := self.in_parts(scores, node, other, factor)) is not None:
                return split
            tensor = self.over_scores(other, node)
            return scores.after(node, "bias", biases=(*scores.biases, Bias(tensor.node, tensor.views, factor)))
        return masked(self, scores, node, "mask", read[0], float("-inf") if read[1] else LOW, other, "low")

    def in_parts(self, scores: Scores, node: Node, other: Node, factor: float = 1.0) -> Scores | None:
        """The scores plus a bias and a mask that were joined before they met the scores; None for any other tensor."""
        while kind(other) == "contiguous":
            other = arguments(other)["x"]
        a = arguments(other) if kind(other) else {}
        if kind(other) in ("where", "masked_fill"):
            sides = (a["x"], a["value"]) if kind(other) == "masked_fill" else (a["a"], a["b"])
            bias = next((side for side in sides if isinstance(side, Node) and self.number(side) is None), None)
            fill = sides[0] if sides[1] is bias else sides[1]
            if bias is None or (low := self.number(fill)) is None or low > -1e30:
                return None
            return filled(self, self._plus(scores, node, bias, factor), node, bias, a)
        parts = (a["a"], a["b"]) if kind(other) == "add" and a.get("alpha", 1) == 1 else ()
        if not all(
            isinstance(part, Node) and len(shape_of(part) or ()) == len(shape_of(other) or ()) for part in parts
        ):
            return None
        if not any(visible(self.element(part, node)) is not None for part in parts):
            return None
        for part in parts:
            scores = self._plus(scores, node, part, factor)
        return scores

    def _clamped(self, scores: Scores, node: Node, before: Node, a: dict[str, Any]) -> Scores:
        if kind(node) == "clamp":
            low, high = self.number(a["min"]), a["max"]
            if high is None and low is not None and low <= -1e30:
                return scores.after(node, "clamp")
        else:
            other = a["b"] if a["a"] is before else a["a"]
            if isinstance(other, Node) and is_hard(self.element(other, node)):
                return scores.after(node, "clamp")
        raise NotAttention("the scores are clamped at a value that a score can reach", node, "clamp")

    def _is_of_row(self, value: Node, node: Node) -> bool:
        """True for a maximum, mean or logarithm of a sum of the scores, one for each row or for all: shifting a row cancels."""
        while kind(value) in ("expand", "expand_as"):
            value = arguments(value)["x"]
        shape, place = shape_of(value) or (), self.places[node]
        if self.varies_with_key(value, node) or (shape and len(shape) != len(place)):
            return False
        while isinstance(value, Node) and kind(value) in ROW_STEPS:
            value = arguments(value)["x"]
        reduced = value.args[0] if kind(value) in REDUCTIONS and value.args else None
        while isinstance(reduced, Node) and kind(reduced) in ("contiguous", "cast"):
            reduced = arguments(reduced)["x"]
        return reduced in self.places


def drops_out(a: dict[str, Any]) -> bool:
    """True when a dropout with these arguments is active."""
    return bool(a["train"]) and not (isinstance(a["p"], int | float) and a["p"] == 0)
