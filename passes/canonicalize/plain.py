"""Bring a functional graph into the form that recognition reads: what others spell by parts stands there as a whole."""

from __future__ import annotations

import torch.fx

from subquad.passes.canonicalize.empty_parts import without_empty_parts
from subquad.passes.canonicalize.joined_axes import axes_joined
from subquad.passes.canonicalize.joined_parts import parts_changed_whole
from subquad.passes.canonicalize.partial_sums import parts_added_whole
from subquad.passes.canonicalize.renormalised import renormalised_once
from subquad.passes.canonicalize.row_factors import rows_changed_last
from subquad.passes.canonicalize.summed_products import products_joined
from subquad.passes.canonicalize.tidy import tidy


def made_plain(module: torch.fx.GraphModule) -> None:
    """Rewrite a functional graph with recorded values in place; the same computation."""
    without_empty_parts(module)
    parts_added_whole(module)
    parts_changed_whole(module)
    products_joined(module)
    renormalised_once(module)
    rows_changed_last(module)
    axes_joined(module)
    tidy(module)
