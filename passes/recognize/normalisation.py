"""Find every softmax of a graph, whether it is called or written out with exponentials and sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx

from subquad.ir.graph import rank_of, users_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.refusing import NotAttention

Node = torch.fx.Node


@dataclass(frozen=True)
class Normalised:
    """A softmax: probabilities `node` of the scores `x` over axis `dim`.

    extra_logit: a further logit in the denominator (softmax-plus-one has 0), None for none.  word: how it is spelled.
    passed: interior nodes of a softmax that is written out.
    """

    node: Node
    x: Any
    dim: int | None
    extra_logit: float | None = None
    word: str = "softmax"
    passed: tuple[Node, ...] = ()


def read_softmax(node: Node) -> Normalised | None:
    """The softmax whose probabilities a node gives; None when it gives none.

    Raises NotAttention for a normalised exponential whose denominator is not the sum of its numerators.
    """
    name = kind(node)
    if name in ("softmax", "softmax_core"):
        a = arguments(node)
        return Normalised(node, a["x"], a["dim"])
    if name == "exp":
        return _exponential(node)
    if name in ("div", "mul"):
        return _quotient(node)
    return None


def _exponential(node: Node) -> Normalised | None:
    """exp(log_softmax(x)) and exp(x - logsumexp(x))."""
    inner = arguments(node)["x"]
    if kind(inner) == "log_softmax":
        a = arguments(inner)
        return Normalised(node, a["x"], a["dim"], word="exp of log_softmax", passed=(inner,))
    if kind(inner) != "sub":
        return None
    a = arguments(inner)
    if kind(a["b"]) != "logsumexp" or a.get("alpha", 1) != 1:
        return None
    total = arguments(a["b"])
    if total["x"] is not a["a"] or not total["keepdim"]:
        return None
    return Normalised(node, a["a"], _one(total["dim"]), word="exp minus logsumexp", passed=(inner, a["b"]))


def _quotient(node: Node) -> Normalised | None:
    """exp(x) / sum(exp(x)), also with a constant in the denominator."""
    a = arguments(node)
    top, bottom = a["a"], a["b"]
    if kind(node) == "mul" or not isinstance(top, Node) or not isinstance(bottom, Node):
        return None
    exponential = _behind_casts(top)
    if kind(exponential) != "exp":
        return None
    extra, total, passed = None, bottom, [top, bottom, exponential]
    if kind(bottom) == "add":
        b = arguments(bottom)
        total, extra = (b["a"], b["b"]) if isinstance(b["a"], Node) else (b["b"], b["a"])
        passed.append(total)
    if (
        kind(total) != "sum"
        or not arguments(total)["keepdim"]
        or _behind_casts(arguments(total)["x"]) is not exponential
    ):
        return None
    dim = _one(arguments(total)["dim"])
    x = arguments(exponential)["x"]
    if extra is None:
        return Normalised(node, x, dim, word="exp over its sum", passed=tuple(passed))
    if extra == 1 and not _stabilised(x):
        return Normalised(node, x, dim, 0.0, "exp over one plus its sum", tuple(passed))
    raise NotAttention(
        f"the exponentials are divided by their sum plus {extra}, which is not a softmax", node, "denominator"
    )


def _behind_casts(node: Any) -> Any:
    while kind(node) in ("cast", "contiguous"):
        node = arguments(node)["x"]
    return node


def _stabilised(x: Any) -> bool:
    x = _behind_casts(x)
    return kind(x) == "sub"


def _one(dim: Any) -> int | None:
    if isinstance(dim, list | tuple):
        return int(dim[0]) if len(dim) == 1 else None
    return dim if isinstance(dim, int) else None


def is_used(node: Node) -> bool:
    """False for a value that nothing reads."""
    return bool(users_of(node)) and rank_of(node) is not None
