"""Prove which leading columns of which values are equal for all rows of a batch, or for groups of its rows.

Abstract interpretation: of each tensor of a captured graph either a claim is proved, or nothing is said.  A claim is about
equality between the rows of one run; whether the shared part can be computed without the rest is decided by the proof of
token locality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.site import Site
from subquad.passes.recognize.symbolic_tensor import axis, size_of
from subquad.passes.share_prefix.claims import Claims, Shared, Sizes
from subquad.passes.share_prefix.shared_attention import attention
from subquad.passes.share_prefix.shared_rules import transfer

Node = torch.fx.Node


def shared_rows(
    module: torch.fx.GraphModule, sites: Sequence[Site] = (), declared: Mapping[str, sympy.Basic] | None = None
) -> Claims:
    """The claim of every node that has one.

    module: a captured graph with recorded values, the first axis of whose inputs is the batch.  sites: its attention sites,
    over whose scores their masks carry the claims.  declared: by name, inputs [B, T, …] whose rows agree in so many leading
    columns, by a guard at run time or because the user says so.
    """
    claims: Claims = {}
    batch = batch_sizes(module)
    by_result = {site.out: site for site in sites}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            columns = (declared or {}).get(str(node.target))
            found = None if columns is None else Shared(axis(0), axis(1), sympy.sympify(columns), sympy.S.Zero)
        elif node in by_result:
            found = attention(by_result[node], claims, batch)
        else:
            found = transfer(node, claims, batch)
        if found is not None:
            claims[node] = found
    return claims


def batch_sizes(module: torch.fx.GraphModule) -> Sizes:
    """Sizes that count rows: the symbolic first axes of the inputs, or where none is, their fixed ones."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder" and not node.meta.get("parameter")]
    firsts = [shape[0] for node in inputs if (shape := shape_of(node))]
    symbolic = {size_of(size) for size in firsts if isinstance(size, torch.SymInt)}
    return symbolic or {size_of(size) for size in firsts if size != 1}
