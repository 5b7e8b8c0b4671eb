"""Write the attention sites of a decoder's graphs: over a prompt alone, or over what a state holds of every row."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx

from subquad.kernels.spec import SoftmaxSpec
from subquad.pair_tables import PairTables
from subquad.token_axis import TokenAxis, operator_arguments

Node = torch.fx.Node
RECURRENT = ("state", "window_k", "window_v", "seen")
aten = torch.ops.aten


def state_names(site: Node) -> tuple[str, ...]:
    """The kinds of state that an attention operator carries."""
    return ("k", "v") if site.target is torch.ops.subquad.softmax_attention.default else RECURRENT


def _call(graph: torch.fx.Graph, site: Node, named: Mapping[str, Any]) -> Node:
    arguments = site.target._schema.arguments  # type: ignore[union-attr]
    return graph.call_function(site.target, tuple(named[a.name] for a in arguments))  # type: ignore[arg-type]


class PromptSites:
    """Sites of rows [B, T] before which nothing came: they read the new keys, and leave them in the buffers."""

    def __init__(self, graph: torch.fx.Graph, shared: Mapping[str, Node], pairs: PairTables) -> None:
        self.graph, self.columns, self.pairs = graph, shared["columns"], pairs

    def site(self, site: Node, mapping: dict[Node, Node], tables: dict[Node, Node], state: list[Node]) -> Node:
        """The operator node of a site; tables: what masks read over the whole history."""
        over = dict(tables) if len(state) == 2 else {}
        if (bias := operator_arguments(site).get("bias")) is not None:
            over[bias] = self.pairs.bias(bias)
        named = dict(torch.fx.node.map_arg(operator_arguments(site), lambda n: over.get(n, mapping.get(n))))
        if len(state) == 4:
            named |= dict(zip(RECURRENT, state, strict=True))
        else:
            for buffer, value in zip(state, (named["k"][0], named["v"][0]), strict=True):
                self.graph.call_function(aten.index_copy_.default, (buffer, 1, self.columns, value))
        return _call(self.graph, site, named)

    def cross(self, site: Node, mapping: dict[Node, Node]) -> Node:
        """The operator node of a site whose keys and values are fixed."""
        return self.graph.node_copy(site, lambda n: mapping[n])

    def output(self, made: Node, number: int) -> Node:
        """One output of a site's operator."""
        return self.graph.call_function(operator.getitem, (made, number))


class StepSites:
    """Sites of a step, in whose graph the w tokens of B rows are B * w tokens of one row: inside a site they are rows again.

    A softmax writes its keys at (rows, places) of the buffers and reads the first slots of each row; the mask is evaluated
    at the columns of queries and slots, and `tree` says which slots hold what comes before a query at all.
    """

    def __init__(
        self, graph: torch.fx.Graph, shared: Mapping[str, Node], axes: Mapping[Node, TokenAxis],
        pairs: PairTables | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.shared, self.axes, self.pairs = graph, shared, axes, pairs
        size = aten.sym_size.int
        self.batch, self.width = (graph.call_function(size, (shared["queries"], n)) for n in (0, 1))
        self.slots = graph.call_function(size, (shared["keys"], 1))

    def site(self, site: Node, mapping: dict[Node, Node], tables: dict[Node, Node], state: list[Node]) -> Node:
        """The operator node of a site; tables: what masks read over the whole history."""
        over = dict(tables) if len(state) == 2 else {}
        if (bias := operator_arguments(site).get("bias")) is not None and self.pairs is not None:
            over[bias] = self.pairs.bias(bias)
        named = dict(
            torch.fx.node.map_arg(
                operator_arguments(site), lambda n: over[n] if n in over else self._by_row(n, mapping[n])
            )
        )
        if len(state) == 4:
            named |= dict(zip(RECURRENT, state, strict=True))
            real = self.shared["real"]
            if named["valid"] is not None:
                real = self.graph.call_function(aten.logical_and.default, (real, named["valid"]))
            named["valid"] = real
        else:
            self._softmax(site, named, mapping, state)
        return _call(self.graph, site, named)

    def cross(self, site: Node, mapping: dict[Node, Node]) -> Node:
        """The operator node of a site whose keys and values are fixed: they are rows as they stand."""
        named = dict(torch.fx.node.map_arg(operator_arguments(site), lambda n: self._by_row(n, mapping[n])))
        return _call(self.graph, site, {**named, "q_positions": self.shared["queries"]})

    def output(self, made: Node, number: int) -> Node:
        """One output of a site's operator, its rows strung to one."""
        out = self.graph.call_function(operator.getitem, (made, number))
        return self.graph.call_function(aten.unsqueeze.default, (self._strung(out), 0))

    def _softmax(self, site: Node, named: dict[str, Any], mapping: dict[Node, Node], state: list[Node]) -> None:
        call, shared = self.graph.call_function, self.shared
        for name, written in self._written(site, mapping, state).items():
            named[name] = [call(aten.slice.Tensor, (written, 1, 0, self.slots))]
        named["positions"] = [shared["keys"]]
        named["q_positions"] = shared["queries"]
        spec = SoftmaxSpec.parse(named["spec"])
        seen = f"t{len(named['operands'])}[b, i, j]"
        named["spec"] = replace(spec, mask=f"({spec.mask}) & {seen}").json()
        named["operands"] = [*named["operands"], shared["tree"]]

    def _written(self, site: Node, mapping: dict[Node, Node], state: list[Node]) -> dict[str, Node]:
        """The buffers of a softmax by argument, with the new keys and values in their places."""
        call, shared, found = self.graph.call_function, self.shared, {}
        for name, buffer in zip(("k", "v"), state, strict=True):
            new = call(aten.select.int, (mapping[operator_arguments(site)[name][0]], 0, 0))
            found[name] = call(aten.index_put_.default, (buffer, [shared["rows"], shared["places"]], new))
        return found

    def _by_row(self, source: Node, value: Node) -> Node:
        """A value over the strung tokens, [1, B * w, ...], as [B, w, ...]; any other as it is."""
        if self.axes.get(source) != TokenAxis(1):
            return value
        flat = self.graph.call_function(aten.select.int, (value, 0, 0))
        return self.graph.call_function(aten.unflatten.int, (flat, 0, [self.batch, self.width]))

    def _strung(self, value: Node) -> Node:
        return self.graph.call_function(aten.flatten.using_ints, (value, 0, 1))
