"""What a graph does after a softmax to rows that see no key."""

from __future__ import annotations

from typing import Any

import sympy
import torch.fx

from subquad.ir.mask import EmptyRows
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.chain import Indices
from subquad.passes.recognize.mask_relation import implies, negate
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_chain import ScoreReader
from subquad.passes.recognize.score_fills import one_where
from subquad.passes.recognize.score_frame import SHAPES
from subquad.passes.recognize.scores import Scores
from subquad.passes.recognize.symbolic_tensor import as_condition

Node = torch.fx.Node


def guarded_rows(user: Node, probabilities: Node, place: Indices, scores: Scores, reader: ScoreReader) -> EmptyRows:
    """The value that an operation on the probabilities gives to rows without keys.

    Understood: nan_to_num with zero, a fill with zero of exactly the hidden keys, a product with exactly the mask, and the
    guard of a decomposed SDPA, where(row has no key, 0, p).  Raises NotAttention for anything that changes a probability of
    a visible key.
    """
    a = arguments(user)
    if kind(user) == "nan_to_num":
        if a["nan"] in (0, None):
            return "zero" if scores.infinite else "mean"
        raise NotAttention("nan_to_num puts another number than zero in the place of empty rows", user, "guard")
    if kind(user) == "mul":
        reader.places.setdefault(user, place)
        factor = reader.element(a["b"] if a["a"] is probabilities else a["a"], user)
        shown = one_where(factor)
        if shown is None or not _same(reader.in_frame(shown, user), scores.predicate):
            raise NotAttention(
                "the attention probabilities are multiplied by something else than their mask", user, "guard"
            )
        return "nan" if scores.infinite else "zero"
    if kind(user) == "masked_fill":
        condition, value, hidden_when = a["mask"], a["value"], True
    else:
        condition, value, hidden_when = a["cond"], a["b"], False
        if a["b"] is probabilities:
            value, hidden_when = a["a"], True
    if reader.number(value) != 0:
        raise NotAttention("the attention probabilities are replaced by something that is not zero", user, "guard")
    if hidden_when and _is_empty_row(condition, scores):
        return "zero"
    reader.places.setdefault(user, place)
    seen = as_condition(reader.element(condition, user))
    seen = reader.in_frame(negate(seen) if hidden_when else seen, user)
    if not _same(seen, scores.predicate):
        raise NotAttention(
            "probabilities are set to zero after the softmax for other keys than the mask hides", user, "guard"
        )
    return "zero"


def _same(a: sympy.Basic, b: sympy.Basic) -> bool:
    return a == b or (implies(a, b) and implies(b, a))


def decomposed_nan_to_num(probabilities: Node) -> tuple[Node, ...]:
    """The nodes of where(p == inf, …, where(p == -inf, …, where(isnan(p), 0, p))), the result last; () when it is not there.

    Probabilities are never infinite, so what replaces an infinity does not matter.
    """
    here, passed, zeroed = probabilities, list[Node](), False
    while True:
        for user in here.users:
            test, value, kept = _replaced(user)
            if kept is not here or kind(test) not in ("isnan", "eq", "ne"):
                continue
            condition, test = test, arguments(test)
            if _finds_nan(condition, probabilities) and is_zero(value):
                zeroed = True
            elif (
                kind(condition) != "eq"
                or test.get("a") is not probabilities
                or test.get("b") not in (float("inf"), float("-inf"))
            ):
                continue
            passed += [condition, user]
            here = user
            break
        else:
            break
    complete = zeroed and all(user in passed or kind(user) in SHAPES for user in probabilities.users)
    return tuple(passed) if complete else ()


def _replaced(user: Node) -> tuple[Any, Any, Any]:
    """(condition, value put where it holds, tensor kept elsewhere) of a where or a fill; three times None for others."""
    if kind(user) not in ("where", "masked_fill"):
        return None, None, None
    a = arguments(user)
    return (a["cond"], a["a"], a["b"]) if kind(user) == "where" else (a["mask"], a["value"], a["x"])


def _finds_nan(condition: Node, probabilities: Node) -> bool:
    """isnan(p), or p != p."""
    a = arguments(condition)
    if kind(condition) == "isnan":
        return a["x"] is probabilities
    return kind(condition) == "ne" and a["a"] is probabilities and a["b"] is probabilities


def is_zero(value: Any) -> bool:
    """True for the number zero and for a tensor that is filled with it."""
    if kind(value) in ("zeros_like", "new_zeros", "zeros"):
        return True
    while kind(value) in ("scalar_tensor", "full", "full_like"):
        value = arguments(value)["value"]
    return isinstance(value, int | float) and value == 0


def _is_empty_row(condition: Any, scores: Scores) -> bool:
    """not(any(not(scores == -inf))) over the keys, or all(scores == -inf)."""
    inverted = False
    while kind(condition) in ("not", "contiguous", "cast"):
        inverted ^= kind(condition) == "not"
        condition = arguments(condition)["x"]
    name = kind(condition)
    if name not in ("any", "all") or (name == "any") != inverted:
        return False
    inner = arguments(condition)["x"]
    opposite = False
    while kind(inner) in ("not", "contiguous", "cast"):
        opposite ^= kind(inner) == "not"
        inner = arguments(inner)["x"]
    if kind(inner) not in ("eq", "ne"):
        return False
    opposite ^= kind(inner) == "ne"
    a = arguments(inner)
    return opposite == (name == "any") and a["a"] in scores.passed and a["b"] == float("-inf")
