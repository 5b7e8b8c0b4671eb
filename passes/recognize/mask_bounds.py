"""How far from zero the elements of an integer tensor can be: what keeps arithmetic on tables from overflowing unseen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import dtype_of, node_inputs, shape_of, value_of
from subquad.ir.vocabulary import arguments, kind

Node = torch.fx.Node
POSITIONS = 1 << 20
"""Indices and sizes are below."""
GIVEN = {torch.int64: 1 << 31, torch.int32: (1 << 30) - 1}
"""What inputs are taken not to exceed, as ids and masks do not; narrower integers may hold whatever they can."""

COPIES = frozenset([
    "unsqueeze", "squeeze", "view", "flatten", "unflatten", "transpose", "t", "reversed", "permute", "movedim", "slice",
    "select", "narrow", "getitem", "flip", "roll", "contiguous", "repeat", "repeat_interleave", "expand", "expand_as",
    "cast", "neg", "abs", "relu", "amax", "extreme", "tril", "triu", "gather", "index", "index_select",
])  # fmt: skip
"""Every element is zero or, up to its sign, an element of `x`."""
CHOICES = frozenset(["where", "masked_fill", "cat", "stack", "hstack", "vstack", "maximum", "minimum", "slice_scatter",
                     "select_scatter", "copy", "fill", "clamp", "pad"])  # fmt: skip
"""Every element is an element of one of the tensors or numbers that the operation reads."""
UNREAD = frozenset(["cond", "mask", "dim", "start", "end", "step", "index", "pad", "mode"])
SEVERAL = frozenset(["unbind", "split", "split_with_sizes", "chunk", "meshgrid", "broadcast_tensors"])
"""Their results hold elements of the tensors that they read."""
RANKED = frozenset(["topk", "sort", "max", "min", "cummax", "cummin", "kthvalue", "mode"])
"""Their results are elements and places."""
PLACES = frozenset(["searchsorted", "bucketize", "argsort", "argmax", "argmin"])


def limit(dtype: torch.dtype) -> float:
    """What an integer dtype can hold at most, in either direction; infinity for other dtypes."""
    if dtype == torch.bool:
        return 1
    if dtype.is_floating_point or dtype.is_complex:
        return math.inf
    return -torch.iinfo(dtype).min or torch.iinfo(dtype).max


class Bounds:
    """Bounds of a graph's integer tensors, each found once.

    constant: the content of a node that is a stored tensor, None for others.  written: nodes whose memory the graph writes
    to, of which only the dtype tells anything.
    """

    def __init__(self, constant: Callable[[Node], torch.Tensor | None], written: frozenset[Node]) -> None:
        self._constant, self._written = constant, written
        self._known: dict[Node, float] = {}

    def of(self, node: Node) -> float:
        """The largest magnitude that an element can have; what its dtype can hold when nothing tells more.

        As a float: from 2^53 on it may be rounded up.
        """
        pending = [node]
        while pending:
            here = pending[-1]
            missing = [n for n in self._asked(here) if n not in self._known] if here not in self._known else []
            if missing:
                pending.extend(missing)
                continue
            if here not in self._known:
                self._known[here] = float(self._bound(here))
            pending.pop()
        return self._known[node]

    def _asked(self, node: Node) -> list[Node]:
        dtype = dtype_of(node)
        if node.op in ("placeholder", "get_attr") or node in self._written or (dtype and limit(dtype) in (1, math.inf)):
            return []
        return [n for n in node.all_input_nodes if value_of(n) is not None]

    def _bound(self, node: Node) -> float:
        recorded, dtype = value_of(node), dtype_of(node)
        if isinstance(recorded, int | torch.SymInt):
            return abs(recorded) if isinstance(recorded, int) else POSITIONS
        if dtype is None:
            return self._of_several(node)
        most = limit(dtype)
        if most in (1, math.inf) or node in self._written:
            return most
        constant = self._constant(node)
        if constant is not None:
            return max(abs(int(constant.min())), abs(int(constant.max()))) if constant.numel() else 0
        if node.op == "placeholder":
            return min(most, GIVEN.get(dtype, most))
        try:
            found = self._computed(node)
        except (KeyError, TypeError):
            return most
        return found if found <= most else most

    def _of_several(self, node: Node) -> float:
        read = max((self._known[n] for n in node.all_input_nodes if dtype_of(n) is not None), default=math.inf)
        if kind(node) in SEVERAL:
            return read
        return max(read, POSITIONS) if _name(node) in RANKED else math.inf

    def _computed(self, node: Node) -> float:
        name = kind(node)
        if _name(node) in PLACES:
            return max(_elements({}, shape_of(n) or ()) for n in node.all_input_nodes)
        a = arguments(node)
        if name in COPIES:
            return self._argument(a["x"])
        if name in CHOICES:
            return max(self._argument(value) for key, value in a.items() if key not in UNREAD and value is not None)
        if name in ("add", "sub", "rsub"):
            first, second = self._argument(a["a"]), self._argument(a["b"])
            return abs(a["alpha"]) * first + second if name == "rsub" else first + abs(a["alpha"]) * second
        if name == "mul":
            return self._argument(a["a"]) * self._argument(a["b"])
        if name in ("mod", "fmod"):
            return self._argument(a["b"])
        if name == "floordiv":
            return self._argument(a["a"]) + 1
        if name in ("sum", "cumsum"):
            return self._argument(a["x"]) * _elements(a, shape_of(a["x"]) or ())
        return 1 if name in ("sign", "one_hot") else math.inf

    def _argument(self, value: Any) -> float:
        if isinstance(value, bool | int | float):
            return abs(float(value))
        return max((self._known[n] for n in node_inputs(value)), default=math.inf)


def _name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.removeprefix("aten::"))
    return str(getattr(node.target, "__name__", node.target))


def _elements(a: dict[str, Any], shape: tuple[Any, ...]) -> float:
    """How many elements a sum over the axes `dim` has at most."""
    dim = a.get("dim")
    places = range(len(shape)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return math.prod(shape[n] if isinstance(shape[n], int) else POSITIONS for n in places)
