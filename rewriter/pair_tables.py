"""Write what depends on the places of a query and a key alone, such as a relative bias, for the tokens of a pass.

In a captured graph such a value is a table over all pairs of tokens, made of counters, parameters and operations that treat
pairs alone.  Read from its end, every axis is that of queries or that of keys, down to the counters; put the columns of a
pass in their places and the same operations give the rows that the pass needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from subquad.ir.graph import value_of
from subquad.token_axis import (
    Locality,
    expression_of,
    is_pointwise,
    name_of,
    operator_arguments,
    refuse,
    shape_of,
)

Node = torch.fx.Node
Roles = tuple[str | None, ...]
aten = torch.ops.aten
ALONE = {
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "zeros_like", "ones_like", "full_like",
    "dropout",
}  # fmt: skip
"""Operations on one tensor that treat elements alone, beside those that torch calls pointwise."""
SAME = {"contiguous", "clone", "alias", "detach", "lift_fresh_copy", "dropout"}
CONSTANT = {"zeros": 0, "ones": 1}


def treats_pairs_alone(node: Node) -> bool:
    """Whether an operation treats elements alone: pointwise, or a minimum or maximum of two tensors."""
    return is_pointwise(node) or name_of(node) in ALONE or str(node.target) in ("aten.min.other", "aten.max.other")


class PairTables:
    """Values over pairs (query, key) in a graph under construction.

    queries: the node int64 [B, w] of the columns of queries.  keys: [B, S] of those of keys.  Values are [B, *axes], where
    an axis of tokens has w or S elements, or [*axes] where nothing depends on tokens; axes may be of size one instead.
    """

    def __init__(self, graph: torch.fx.Graph, proof: Locality, queries: Node, keys: Node) -> None:
        self.graph, self.proof = graph, proof
        self.columns = {"q": queries, "k": keys}
        self.known: dict[tuple[Node, Roles], Node] = {}

    def bias(self, node: Node) -> Node:
        """A bias that is broadcast to [B, H, T, T], as [B or 1, H or 1, w, S]."""
        sizes = shape_of(node)
        roles = tuple(
            (None, None, "q", "k")[n - len(sizes)] if self._long(size) else None for n, size in enumerate(sizes)
        )
        made = self._value(node, roles)
        if not any(roles):
            return made
        if len(sizes) == 4:
            return self._call(aten.squeeze.dim, made, 1)
        for _ in range(3 - len(sizes)):
            made = self._call(aten.unsqueeze.default, made, 1)
        return made

    def _long(self, size: Any) -> bool:
        return self.proof.depends_on_length(size)

    def _call(self, target: Any, *args: Any) -> Node:
        return self.graph.call_function(target, args)

    def _value(self, node: Node, roles: Roles) -> Node:
        key = (node, roles)
        if key not in self.known:
            self.known[key] = self._made(node, roles)
        return self.known[key]

    def _made(self, node: Node, roles: Roles) -> Node:
        name = name_of(node)
        if name == "arange" and roles[0] is not None:
            return self._counter(node, roles[0])
        if name in (*CONSTANT, "full"):
            return self._fill(node, name)
        if not any(roles):
            return self.graph.node_copy(node, lambda n: self._value(n, (None,) * len(shape_of(n))))
        if name == "slice" and shape_of(node) == shape_of(node.args[0]):
            return self._value(self._source(node), roles)
        if name in SAME:
            return self._value(self._source(node), roles)
        if name == "expand":
            return self._expanded(node, roles)
        if treats_pairs_alone(node):
            return self.graph.node_copy(node, lambda n: self._operand(n, roles))
        if name in ("permute", "transpose", "unsqueeze", "squeeze"):
            return self._moved(node, name, roles)
        if name == "embedding" and roles[-1] is None:
            table, places = node.args[0], node.args[1]
            return self._call(node.target, self._value(table, (None, None)), self._value(places, roles[:-1]))  # type: ignore[arg-type]
        refuse(node, f"`{name}` makes a table of tokens by tokens in a way that is not understood.")
        raise AssertionError

    def _source(self, node: Node) -> Node:
        source = node.args[0]
        assert isinstance(source, Node)
        return source

    def _counter(self, node: Node, role: str) -> Node:
        named, columns = operator_arguments(node), self.columns[role]
        step, start = named.get("step", 1), named.get("start", 0)
        if not isinstance(step, int) or not isinstance(start, int):
            refuse(node, "`arange` starts at a number that is not constant.")
        made = columns if step == 1 else self._call(aten.mul.Tensor, columns, step)
        made = made if start == 0 else self._call(aten.add.Tensor, made, start)
        return made if value_of(node).dtype == torch.int64 else self._call(aten.to.dtype, made, value_of(node).dtype)

    def _fill(self, node: Node, name: str) -> Node:
        """A constant, which is the same at all places."""
        value = operator_arguments(node)["fill_value"] if name == "full" else CONSTANT[name]
        made = self._call(aten.full.default, [1] * len(shape_of(node)), value)
        made.kwargs = {"dtype": value_of(node).dtype, "device": value_of(node).device}
        return made

    def _operand(self, node: Node, roles: Roles) -> Node:
        """An operand that is broadcast to a value with these roles."""
        sizes = shape_of(node)
        own = tuple(
            role if self._long(size) else None
            for role, size in zip(roles[len(roles) - len(sizes) :], sizes, strict=True)
        )
        made = self._value(node, own)
        for _ in range(len(roles) - len(sizes) if any(own) else 0):
            made = self._call(aten.unsqueeze.default, made, 1)
        return made

    def _expanded(self, node: Node, roles: Roles) -> Node:
        """Left as it is: whatever reads it is broadcast."""
        source, sizes = self._source(node), shape_of(node)
        if any(isinstance(size, int) and size != 1 and size != old for size, old in _right(sizes, shape_of(source))):
            refuse(node, "`expand` repeats heads of a table of tokens by tokens.")
        return self._operand(source, roles)

    def _moved(self, node: Node, name: str, roles: Roles) -> Node:
        """Axes in another order, or one of size one put in or taken out; the rows' axis stays in front."""
        source = self._source(node)
        rank, named = len(shape_of(source)), operator_arguments(node)
        if name == "unsqueeze":
            place = named["dim"] % (rank + 1)
            return self._call(
                aten.unsqueeze.default, self._value(source, roles[:place] + roles[place + 1 :]), place + 1
            )
        if name == "squeeze":
            if not isinstance(named.get("dim"), int) or self._long(shape_of(source)[named["dim"]]):
                refuse(node, "`squeeze` of several axes of a table of tokens by tokens is not understood.")
            place = named["dim"] % rank
            own = (*roles[:place], None, *roles[place:])
            return self._call(aten.squeeze.dim, self._value(source, own), place + 1)
        order = list(range(rank))
        if name == "permute":
            order = [d % rank for d in named["dims"]]
        else:
            a, b = named["dim0"] % rank, named["dim1"] % rank
            order[a], order[b] = order[b], order[a]
        before = tuple(roles[order.index(n)] for n in range(rank))
        return self._call(aten.permute.default, self._value(source, before), [0, *(n + 1 for n in order)])


def _right(sizes: tuple[Any, ...], old: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """Sizes beside those of a tensor that is broadcast to them."""
    padded = (1,) * (len(sizes) - len(old)) + tuple(old)
    return [(size, was) for size, was in zip(sizes, padded, strict=True) if not expression_of(size).free_symbols]
