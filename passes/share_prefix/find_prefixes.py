"""Find the prefixes that a graph itself shows to be shared: by the whole network, or by the keys and values of one site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch
import torch.fx

from subquad.ir.graph import source_of
from subquad.ir.mask import print_expression
from subquad.ir.prefix import Prefix
from subquad.ir.site import Site
from subquad.ir.vocabulary import kind
from subquad.passes.share_prefix.claims import Shared, meet
from subquad.passes.share_prefix.shared_attention import operand_claim
from subquad.passes.share_prefix.shared_rows import shared_rows

Node = torch.fx.Node


def find_prefixes(
    module: torch.fx.GraphModule, sites: Sequence[Site], declared: Mapping[str, sympy.Basic] | None = None
) -> list[Prefix]:
    """One prefix of the whole network when every site shares it, result included; else one per site that does.

    module: a captured graph with recorded values.  declared: inputs whose rows agree in so many leading columns.
    """
    claims = shared_rows(module, sites, declared)
    if sites and all(site.out in claims for site in sites):
        whole = _common(claims, [operand for site in sites for operand in (site.q, site.k, site.v)])
        if whole is not None:
            where = f"queries, keys, values and results of all {len(sites)} sites agree in these columns"
            return [_prefix("", whole, claims, where)]
    found = []
    for site in sites:
        claim = _common(claims, [site.k, site.v])
        if claim is not None:
            found.append(_prefix(site.path, claim, claims, "keys and values of this site agree in these columns"))
    return found


def _common(claims: Mapping[Node, Shared], operands: Sequence[object]) -> Shared | None:
    found = [operand_claim(operand, claims) for operand in operands]  # type: ignore[arg-type]
    known = [one for one in found if one is not None]
    return meet(known) if len(known) == len(found) else None


def _prefix(path: str, claim: Shared, claims: Mapping[Node, Shared], where: str) -> Prefix:
    columns = "all" if claim.column is None else str(claim.columns)
    return Prefix(path, columns, grouping(claim.group), (where, *_sources(claims)))


def grouping(group: sympy.Basic) -> str:
    """A grouping of rows in words."""
    if group == 0:
        return "all rows"
    return f"rows r of equal {print_expression(group, {}, {})}"


def _sources(claims: Mapping[Node, Shared]) -> list[str]:
    """Where shared columns meet own ones."""
    joints = [
        n for n, claim in claims.items() if kind(n) == "cat" and any(part not in claims for part in n.all_input_nodes)
    ]
    return [f"joined with columns of each row at {source_of(node)}" for node in joints[:1] if source_of(node)]
