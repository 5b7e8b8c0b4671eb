"""Write the attention sites of steps whose rows share keys: the row's own keys, then the nodes of the tree above it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx

from subquad.kernels.spec import SoftmaxSpec
from subquad.mask_terms import behind, moves_along, unpadded
from subquad.step_sites import StepSites
from subquad.token_axis import TokenAxis, operator_arguments

Node = torch.fx.Node


class SharedSites(StepSites):
    """Sites of a step of rows of which a softmax reads shared nodes too; without nodes it is the step of plain rows.

    Nodes hold no padding and every query comes after all of its nodes, so that of a mask only what `behind` leaves is evaluated
    over them.
    """

    def __init__(
        self, graph: torch.fx.Graph, shared: Mapping[str, Node], axes: Mapping[Node, TokenAxis], padding: Collection[Node],
        pools: Mapping[Node, Sequence[Node]], *, fresh: bool,
    ) -> None:  # fmt: skip
        """padding: tables that are the padding mask.  pools: the stored keys and values of each softmax site.  fresh: rows
        hold no keys of their own yet.
        """
        super().__init__(graph, shared, axes)
        self.padding, self.pools, self.fresh = padding, pools, fresh
        self._above: dict[Node, tuple[Any, ...]] = {}

    def site(self, site: Node, mapping: dict[Node, Node], tables: dict[Node, Node], state: list[Node]) -> Node:
        """The operator node over a row's own keys, or that of a recurrence."""
        made = super().site(site, mapping, tables, state)
        if site in self.pools:
            given = operator_arguments(site)
            own = SoftmaxSpec.parse(given["spec"])
            spec = replace(own, mask=behind(self._mask(site)), empty_rows="zero").json()
            read = [tables.get(n, mapping[n]) for n in given["operands"]]
            scalars = torch.fx.node.map_arg(given["scalars"], lambda n: mapping[n])
            q = self._by_row(given["q"], mapping[given["q"]])
            self._above[made] = (
                q,
                *self.pools[site],
                self.shared["nodes"],
                self.shared["queries"],
                read,
                scalars,
                spec,
            )
        return made

    def output(self, made: Node, number: int) -> Node:
        """One output of a site's operator, its rows strung to one."""
        if made not in self._above:
            return super().output(made, number)
        call = self.graph.call_function
        q, k, v, nodes, queries, read, scalars, spec = self._above[made]
        state = [call(operator.getitem, (made, n)) for n in (0, 1)]
        joined = call(
            torch.ops.subquad.prefix_attention.default, (q, k, v, nodes, queries, *state, read, scalars, spec)
        )
        return call(torch.ops.aten.unsqueeze.default, (self._strung(joined), 0))

    def _softmax(self, site: Node, named: dict[str, Any], mapping: dict[Node, Node], state: list[Node]) -> None:
        if not self.fresh:
            super()._softmax(site, named, mapping, state)
            return
        mask = self._mask(site)
        self._written(site, mapping, state)
        given = operator_arguments(site)
        for name in ("k", "v"):
            named[name] = [self._by_row(given[name][0], mapping[given[name][0]])]
        if not moves_along(mask):
            named["positions"], named["q_positions"] = [self.shared["queries"]], self.shared["queries"]
        named["spec"] = replace(SoftmaxSpec.parse(named["spec"]), mask=mask).json()

    def _mask(self, site: Node) -> str | None:
        """The site's mask where no token is padding."""
        given = operator_arguments(site)
        mask = SoftmaxSpec.parse(given["spec"]).mask
        return (
            None
            if mask is None
            else unpadded(mask, {f"t{n}" for n, t in enumerate(given["operands"]) if t in self.padding})
        )
