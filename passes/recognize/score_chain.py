"""Read the operations between a softmax and its score product: scale, softcap, biases, masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import rank_of, shape_of, value_of
from subquad.ir.mask import KV, B, H, Q
from subquad.ir.site import Bias
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.symbolic_tensor import as_condition, axis, is_hard, visible

Node = torch.fx.Node


class NotAttention(Exception):
    """Raised inside the interpreter with the sentence that becomes a refusal's reason, and the node it is about."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Scores:
    """The scores as read so far: softcap(scale·q·k) + biases, seen where `predicate` holds.

    product: the matmul.  infinite: every hidden key was filled with -inf (then a row without keys is NaN).
    passed: interior nodes.  words: what was read, from the product to the softmax.
    """

    product: Node
    scale: float = 1.0
    softcap: float | None = None
    biases: tuple[Bias, ...] = ()
    predicate: sympy.Basic = sympy.true
    infinite: bool = True
    passed: tuple[Node, ...] = ()
    words: tuple[str, ...] = ()
    mask_nodes: tuple[Node, ...] = ()

    def after(self, node: Node, word: str, **changes: Any) -> Scores:
        """The same scores one operation later."""
        return replace(self, passed=(*self.passed, node), words=(*self.words, word), **changes)


def canonical(expression: sympy.Basic, rank: int) -> sympy.Basic:
    """Rename a score tensor's axes to b, h, q, kv: rank 4 has all, rank 3 no heads, rank 2 only q and kv."""
    names = {4: (B, H, Q, KV), 3: (B, Q, KV), 2: (Q, KV)}[rank]
    return expression.xreplace({axis(n): name for n, name in enumerate(names)})


_CHAIN = frozenset(
    [
        "mul",
        "div",
        "add",
        "sub",
        "tanh",
        "where",
        "masked_fill",
        "maximum",
        "cast",
        "contiguous",
        "dropout",
        "view",
        "rsub",
        "neg",
    ]
)


def read_scores(node: Any, algebra: MaskAlgebra) -> Scores:
    """Interpret the value a softmax is taken of; raises NotAttention with the reason when it is not scores."""
    if not isinstance(node, Node):
        raise NotAttention("the softmax is taken of a constant", node)
    path = _path_to_product(node)
    scores = Scores(path[-1], passed=(path[-1],), words=("matmul",))
    for before, here in zip(reversed(path[1:]), reversed(path[:-1]), strict=True):
        scores = _step(scores, here, before, algebra)
    return scores


def _path_to_product(start: Node) -> list[Node]:
    """The chain of nodes from the softmax's input up to the score product, found by walking the score operand."""
    frontier: list[list[Node]] = [[start]]
    nearest: Node = start
    seen = {start}
    while frontier:
        path = frontier.pop(0)
        here = path[-1]
        if kind(here) in ("matmul", "einsum") and (rank_of(here) or 0) >= 3:
            return path
        if kind(here) not in _CHAIN:
            nearest = here
            continue
        for operand in _score_operands(here):
            if operand not in seen:
                seen.add(operand)
                frontier.append([*path, operand])
    raise NotAttention(_why_no_product(nearest), nearest)


def _why_no_product(node: Node) -> str:
    while kind(node) in ("transpose", "permute", "t", "squeeze", "unsqueeze", "slice", "view") and isinstance(
        node.args[0], Node
    ):
        node = node.args[0]
    name = kind(node)
    if name == "linear" or (name == "matmul" and ((rank_of(node) or 0) < 3 or is_weight(arguments(node)["b"]))):
        return PROJECTION
    what = name or (str(node.target) if node.op != "placeholder" else f"the input {node.name}")
    return f"no product of queries and keys feeds the softmax: the walk up ended at `{what}`"


PROJECTION = (
    "the softmax is taken of a projection by a weight, not of a product of queries and keys: "
    "a router, pooling or classifier, which no attention rewrite applies to"
)


def is_weight(value: Any) -> bool:
    """True for a parameter, possibly behind views: the second factor of a projection."""
    while isinstance(value, Node) and kind(value) in _WEIGHT_VIEWS:
        value = arguments(value)["x"]
    return isinstance(value, Node) and value.op == "get_attr"


_WEIGHT_VIEWS = frozenset(["t", "transpose", "permute", "view", "contiguous", "cast", "unsqueeze", "expand"])


def _score_operands(node: Node) -> list[Node]:
    a = arguments(node)
    names = {"where": ("a", "b"), "masked_fill": ("x",)}.get(kind(node), ("x", "a", "b"))
    rank = rank_of(node)
    shape = shape_of(node) or ()
    found: list[Node] = []
    for name in names:
        value = a.get(name)
        other = shape_of(value)
        if isinstance(value, Node) and other is not None and (rank_of(value) == rank or kind(node) == "view"):
            same = len(other) == len(shape) and all(str(x) == str(y) for x, y in zip(other, shape, strict=True))
            found.insert(0 if same else len(found), value)
    return found


def _step(scores: Scores, node: Node, before: Node, algebra: MaskAlgebra) -> Scores:
    name = kind(node)
    a = arguments(node)
    if name in ("cast", "contiguous"):
        return scores.after(node, name)
    if name == "view":
        if rank_of(node) != rank_of(before):
            raise NotAttention("the scores change their rank between the product and the softmax", node)
        return scores.after(node, name)
    if name == "dropout":
        if a["p"] > 0 and a["train"]:
            raise NotAttention("dropout on the scores in training mode cannot be kept by a rewrite; call eval()", node)
        return scores.after(node, "dropout(0)")
    if name == "tanh":
        if scores.biases or scores.predicate != sympy.true or scores.softcap is not None:
            raise NotAttention("a tanh after a mask, a bias or another tanh is not a softcap", node)
        return scores.after(node, "tanh", softcap=1.0)
    if name in ("mul", "div"):
        return _scaled(scores, node, before, a, algebra)
    if name in ("add", "sub"):
        return _added(scores, node, before, a, algebra)
    if name in ("where", "masked_fill"):
        return _filled(scores, node, before, a, algebra)
    if name == "maximum":
        other = a["b"] if a["a"] is before else a["a"]
        if is_hard(algebra.element(other, shape_of(node) or ())) or _is_hard_constant(other, algebra):
            return scores.after(node, "clamp")
        raise NotAttention("the scores are clamped from below by a value that a score can reach", node)
    raise NotAttention(f"`{name or node.target}` between the scores and the softmax is not understood", node)


def _is_hard_constant(value: Any, algebra: MaskAlgebra) -> bool:
    return isinstance(value, Node) and is_hard(algebra.formula(value).expression)


def constant_of(value: Any, algebra: MaskAlgebra) -> float | None:
    """A scalar argument's number: a Python number, or a tensor whose formula is one; None when it is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node):
        recorded = value_of(value)
        if isinstance(recorded, torch.Tensor):
            expression = algebra.formula(value).expression
            return float(expression) if expression.is_number else None
        if isinstance(recorded, (int, float)):
            return float(recorded)
    return None


def _scaled(scores: Scores, node: Node, before: Node, a: dict[str, Any], algebra: MaskAlgebra) -> Scores:
    divided = kind(node) == "div"
    if divided and (a["a"] is not before or a.get("rounding_mode") is not None):
        raise NotAttention("the scores are a divisor", node)
    other = a["b"] if a["a"] is before else a["a"]
    factor = constant_of(other, algebra)
    if factor is None:
        raise NotAttention("the scores are multiplied by a tensor, not by one number", node)
    if factor == 0:
        raise NotAttention("the scores are multiplied or divided by zero", node)
    factor = 1 / factor if divided else factor
    if (scores.predicate != sympy.true or scores.softcap is not None) and factor <= 0:
        raise NotAttention("masked or capped scores are multiplied by a number that is not positive", node)
    return scores.after(
        node,
        f"{'div' if divided else 'mul'}",
        scale=scores.scale * factor,
        softcap=None if scores.softcap is None else scores.softcap * factor,
        biases=tuple(Bias(b.node, b.factor * factor) for b in scores.biases),
    )


def _added(scores: Scores, node: Node, before: Node, a: dict[str, Any], algebra: MaskAlgebra) -> Scores:
    negative = kind(node) == "sub"
    if negative and a["a"] is not before:
        raise NotAttention("the scores are subtracted from something", node)
    other = a["b"] if a["a"] is before else a["a"]
    sign = (-1.0 if negative else 1.0) * float(a.get("alpha", 1))
    if constant_of(other, algebra) is not None and not _is_hard_constant(other, algebra):
        return scores.after(node, "shift")
    if kind(other) == "reduction" and negative and before in other.all_input_nodes:
        return scores.after(node, "stabilise")
    algebra.formula(other)
    read = visible(algebra.element(other, shape_of(node) or ())) if sign > 0 else None
    if read is None:
        return scores.after(node, "bias", biases=(*scores.biases, Bias(other, sign)))
    return _masked(scores, node, "mask", read[0], read[1], other)


def _filled(scores: Scores, node: Node, before: Node, a: dict[str, Any], algebra: MaskAlgebra) -> Scores:
    shape = shape_of(node) or ()
    if kind(node) == "masked_fill":
        condition, fill, hidden_when = a["mask"], a["value"], True
    else:
        condition, fill, hidden_when = a["cond"], a["b"], False
        if a["b"] is before:
            fill, hidden_when = a["a"], True
    value = constant_of(fill, algebra)
    if value is None or value > -1e9:
        raise NotAttention(
            f"hidden scores are filled with {'a tensor' if value is None else value}, which is not low enough to hide a key",
            node,
        )
    algebra.formula(condition)
    seen = as_condition(algebra.element(condition, shape))
    if hidden_when:
        seen = sympy.Not(seen)
    return _masked(scores, node, "fill", seen, value == float("-inf"), condition)


def _masked(scores: Scores, node: Node, word: str, seen: sympy.Basic, infinite: bool, source: Node) -> Scores:
    rank = rank_of(node) or 0
    if rank not in (3, 4):
        raise NotAttention(f"the scores have {rank} axes; three or four are understood", node)
    predicate = sympy.And(scores.predicate, canonical(seen, rank))
    return scores.after(
        node, word, predicate=predicate, infinite=scores.infinite and infinite, mask_nodes=(*scores.mask_nodes, source)
    )
