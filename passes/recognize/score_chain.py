"""Interpret the operations between a score product and its softmax: scale, gain, softcap, biases, masks, sinks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of, shape_of, value_of
from subquad.ir.mask import Where
from subquad.ir.site import Bias, Gain, ScoreTensor
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.chain import VIEWS, Chain, Indices
from subquad.passes.recognize.folding import folded
from subquad.passes.recognize.frame import Frame, digit
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.mask_relation import negate
from subquad.passes.recognize.normalisation import leads_to_exp
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.scores import LOW, MaskSource, Scores
from subquad.passes.recognize.symbolic_tensor import as_condition, axis, is_boolean, is_hard, is_one, size_of, visible

Node = torch.fx.Node
ROW_STEPS = frozenset(["contiguous", "cast", "unsqueeze", "squeeze", "clamp", "nan_to_num", "getitem", "masked_fill"])
REDUCTIONS = frozenset(["amax", "maximum", "mean", "logsumexp"])
DROPOUT = "dropout on the scores in training mode cannot be kept by a rewrite; call eval()"


def read_scores(chain: Chain, algebra: MaskAlgebra) -> Scores:
    """Interpret a chain; raises NotAttention with the reason when a step of it is not understood."""
    return ScoreReader(chain.frame, chain.places, algebra).read(chain)


@dataclass(frozen=True)
class ScoreReader:
    """Reads one operation after the other, each tensor that meets the scores laid out in their frame.

    shapes: of the scores at a node whose recorded shape is not theirs (an SDPA call).
    """

    frame: Frame
    places: dict[Node, Indices]
    algebra: MaskAlgebra
    shapes: dict[Node, tuple[Any, ...]] = field(default_factory=dict)

    def read(self, chain: Chain) -> Scores:
        """The scores after the whole chain."""
        first = chain.nodes[0]
        scores = Scores(first, scale=chain.product.alpha, passed=(first,), words=(kind(first),))
        if chain.product.addend is not None:
            scores = self._plus(scores, first, chain.product.addend, chain.product.beta)
        for before, node in zip(chain.nodes, chain.nodes[1:], strict=False):
            scores = self._step(scores, node, before)
        return scores

    def _step(self, scores: Scores, node: Node, before: Node) -> Scores:
        name = kind(node)
        a = arguments(node)
        if name == "cast" or name in VIEWS:
            return scores.after(node, name)
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
        if name in ("add", "sub"):
            return self._added(scores, node, before, a)
        if name in ("where", "masked_fill", "index_put"):
            return self._filled(scores, node, before, a)
        if name in ("maximum", "clamp"):
            return self._clamped(scores, node, before, a)
        if name == "cat":
            return self._joined(scores, node, before, a)
        if name == "pad":
            return self._padded(scores, node, a)
        raise NotAttention(
            f"`{name or node.target}` between the scores and the softmax is not understood", node, "step"
        )

    def masked(self, scores: Scores, node: Node, place: Indices) -> Scores:
        """The scores of exponentials, at `place` like the scores, that a product or a fill with zero hides keys of."""
        a = arguments(node)
        sides = [side for side in (a.get("x"), a.get("a"), a.get("b")) if leads_to_exp(side)]
        self.places.update({side: place for side in sides if isinstance(side, Node)} | {node: place})
        if kind(node) in ("masked_fill", "where"):
            kept = kind(node) == "where" and leads_to_exp(a["a"])
            source, value = (a["mask"], a["value"]) if "mask" in a else (a["cond"], a["b"] if kept else a["a"])
            if self.number(value) != 0:
                raise NotAttention("exponentials are filled with another number than zero", node, "mask")
            seen, role = as_condition(self.element(source, node)), "keep" if kept else "hide"
            seen = seen if kept else negate(seen)
        else:
            source = a["b"] if a["a"] in self.places else a["a"]
            shown = one_where(self.element(source, node))
            if shown is None:
                raise NotAttention("exponentials are multiplied by something that is not zero or one", node, "mask")
            seen, role = shown, "keep"
        return self._masked(scores, node, "hidden exponentials", seen, float("-inf"), source, role)

    def require_independent(self, value: Any, node: Node) -> None:
        """Refuse a tensor that is computed from the scores it meets: they would have to exist to compute it."""
        stack, seen = [value], set[Node]()
        while stack:
            here = stack.pop()
            if not isinstance(here, Node) or here in seen or here < self.first:
                continue
            if here in self.places:
                raise NotAttention("the scores meet a tensor that is computed from them", node, "depends-on-scores")
            seen.add(here)
            stack.extend(_contents(here))

    def element(self, value: Any, node: Node) -> sympy.Basic:
        """The formula, in the indices of `node`, of an argument that is broadcast to it."""
        self.require_independent(value, node)
        if isinstance(value, Node) and shape_of(value) is not None:
            self.algebra.formula(value)
        return self.algebra.element(value, self.shapes.get(node) or shape_of(node) or ())

    def in_frame(self, formula: sympy.Basic, node: Node) -> sympy.Basic:
        """A formula of the indices of `node` as one of b, h, q and kv."""
        return self.frame.canonical(formula.xreplace({axis(n): at for n, at in enumerate(self.places[node])}))

    def over_scores(self, value: Node, node: Node) -> ScoreTensor:
        """A tensor that is broadcast to `node`, laid out over the scores."""
        self.require_independent(value, node)
        views = self.frame.views(shape_of(value) or (), len(self.places[node]), self.places[node])
        if views is None:
            raise NotAttention("a tensor meets the scores in a layout that is not understood", node, "layout")
        return ScoreTensor(value, views)

    @property
    def first(self) -> Node:
        """The node that makes the scores."""
        return next(iter(self.places))

    def number(self, value: Any) -> float | None:
        """A scalar argument's number: a Python number, or a tensor whose formula is one; None when it is neither."""
        return constant_of(value, self.algebra)

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
        if scores.gain is not None or not scores.is_bare:
            raise NotAttention(
                "masked, capped or biased scores are multiplied by a tensor, not by one number", node, "gain"
            )
        if self._varies_with_key(other, node):
            raise NotAttention("the scores are multiplied by a tensor that differs from key to key", node, "gain")
        tensor = self.over_scores(other, node)
        return scores.after(node, f"{kind(node)} by a tensor", gain=Gain(tensor.node, tensor.views, divided))

    def _varies_with_key(self, value: Node, node: Node) -> bool:
        shape, place = shape_of(value) or (), self.places[node]
        offset = len(place) - len(shape)
        return any(
            not is_one(size) and digit(self.frame.key) in place[n + offset].free_symbols for n, size in enumerate(shape)
        )

    def _added(self, scores: Scores, node: Node, before: Node, a: dict[str, Any]) -> Scores:
        negative = kind(node) == "sub"
        if negative and a["a"] is not before:
            raise NotAttention("the scores are subtracted from something", node, "step")
        other = a["b"] if a["a"] is before else a["a"]
        if isinstance(other, Node) and self._is_of_row(other, node):
            return scores.after(node, "minus the row's maximum" if negative else "plus a number of the row")
        return self._plus(scores, node, other, (-1.0 if negative else 1.0) * float(a.get("alpha", 1)))

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
            tensor = self.over_scores(other, node)
            return scores.after(node, "bias", biases=(*scores.biases, Bias(tensor.node, tensor.views, factor)))
        return self._masked(scores, node, "mask", read[0], float("-inf") if read[1] else LOW, other, "low")

    def _filled(self, scores: Scores, node: Node, before: Node, a: dict[str, Any]) -> Scores:
        if kind(node) == "masked_fill":
            condition, fill, hidden_when = a["mask"], a["value"], True
        elif kind(node) == "index_put":
            condition, fill, hidden_when = _written_where(node, a), a["values"], True
        else:
            condition, fill, hidden_when = a["cond"], a["b"], False
            if a["b"] is before:
                fill, hidden_when = a["a"], True
        value = self.number(fill)
        if value is None or value > _lowest(before):
            what = "a tensor" if value is None else value
            raise NotAttention(
                f"hidden scores are filled with {what}, which is not low enough to hide a key", node, "soft-fill"
            )
        seen = as_condition(self.element(condition, node))
        if hidden_when:
            seen = negate(seen)
        role = "hide" if hidden_when else "keep"
        return self._masked(scores, node, "fill", seen, value, condition, role)

    def _masked(
        self, scores: Scores, node: Node, word: str, seen: sympy.Basic, fill: float, source: Node, role: str
    ) -> Scores:
        read = MaskSource(self.in_frame(seen, node), source, node, role, fill)
        return scores.after(node, word, masks=(*scores.masks, read))

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
        shape, place = shape_of(value) or (), self.places[node]
        if self._varies_with_key(value, node) or (shape and len(shape) != len(place)):
            return False
        while isinstance(value, Node) and kind(value) in ROW_STEPS:
            value = arguments(value)["x"]
        reduced = value.args[0] if kind(value) in REDUCTIONS and value.args else None
        while isinstance(reduced, Node) and kind(reduced) in ("contiguous", "cast"):
            reduced = arguments(reduced)["x"]
        return reduced in self.places

    def _padded(self, scores: Scores, node: Node, a: dict[str, Any]) -> Scores:
        """One further column of a number beside the keys: a sink that all heads share."""
        pad, value = list(a["pad"]), self.number(a["value"] or 0.0)
        last = digit(self.frame.key) in self.places[node][-1].free_symbols
        if sorted(pad) != [0, 1] or not last or a["mode"] != "constant" or value is None or scores.sinks is not None:
            raise NotAttention("the scores are padded with something that is not one sink logit a row", node, "sink")
        return scores.after(node, "sink", sinks=value, first_key=size_of(pad[0]))

    def _joined(self, scores: Scores, node: Node, before: Node, a: dict[str, Any]) -> Scores:
        """A column of logits beside the keys, whose probability weights no value: a sink."""
        place = self.places[before]
        along = a["dim"] % len(place)
        parts = list(a["tensors"])
        if len(parts) != 2 or place[along] != digit(self.frame.key) or scores.sinks is not None:
            raise NotAttention(
                "the scores are concatenated with something that is not one sink logit a row", node, "sink"
            )
        other = parts[1] if parts[0] is before else parts[0]
        shape = list(shape_of(other) or ())
        if not is_one(shape[along]):
            raise NotAttention("the scores are concatenated with more than one further logit a row", node, "sink")
        first = sympy.S.Zero if parts[0] is before else size_of(shape[along])
        number = self.number(other)
        sinks: ScoreTensor | float = self._column(other, before) if number is None else number
        return scores.after(node, "sink", sinks=sinks, first_key=first)

    def _column(self, column: Node, scores: Node) -> ScoreTensor:
        """An appended column of logits: the tensor behind its expansion, [1, H, 1, 1], or one logit a row, [B, H, Tq, 1]."""
        source = column
        while kind(source) in ("expand", "contiguous", "cast"):
            source = arguments(source)["x"]
        shape, place = shape_of(source) or (), self.places[scores]
        offset = len(place) - len(shape)
        heads = {digit(n) for n in self.frame.heads}
        per_head = offset >= 0 and all(
            is_one(size) or place[n + offset].free_symbols <= heads for n, size in enumerate(shape)
        )
        views = self.frame.views(shape, len(place), place) if per_head else None
        return self.over_scores(column, scores) if views is None else ScoreTensor(source, views)


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


SHAPES = frozenset(["sym_size", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"])


def _contents(node: Node) -> list[Node]:
    """The inputs of an operation that it reads more of than their shapes and dtypes."""
    if kind(node) in SHAPES:
        return []
    if kind(node) in ("expand_as", "cast", "view"):
        return [x for x in node.args[:1] if isinstance(x, Node)]
    return node.all_input_nodes


def is_lifted(value: Node) -> bool:
    """True for a Python number that Dynamo made an input: to read it makes Dynamo compile again when it changes."""
    while value.op == "call_method" and value.target == "item":
        value = value.args[0]  # type: ignore[assignment]
    return value.op == "placeholder" and "grapharg" in value.meta


def _lowest(scores: Node) -> float:
    """What hides a key when it stands in the place of a score: far below any, or the least number of half precision."""
    return float(torch.finfo(torch.float16).min) if dtype_of(scores) == torch.float16 else -1e9


def one_where(factor: sympy.Basic) -> sympy.Basic | None:
    """The condition under which a factor is one; None when it is anything but one or zero."""
    if is_boolean(factor):
        return factor
    if isinstance(factor, Where) and factor.args[1:] == (1, 0):
        return factor.args[0]
    return negate(factor.args[0]) if isinstance(factor, Where) and factor.args[1:] == (0, 1) else None


def drops_out(a: dict[str, Any]) -> bool:
    """True when a dropout with these arguments is active."""
    return bool(a["train"]) and not (isinstance(a["p"], int | float) and a["p"] == 0)


def constant_of(value: Any, algebra: MaskAlgebra) -> float | None:
    """A scalar argument's number: a Python number, or a tensor whose formula is one; None when it is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node):
        recorded = value_of(value)
        if isinstance(recorded, torch.Tensor):
            expression = algebra.formula(value).expression
            if expression.is_number and expression is not sympy.nan:
                return float(expression)
            return folded(value, algebra.module)
        if isinstance(recorded, (int, float)):
            return float(recorded)
        if isinstance(recorded, torch.SymFloat) and is_lifted(value):
            return float(recorded)
    return None
