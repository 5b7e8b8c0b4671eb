"""Take empty parts out of concatenations: the first keys of a growing cache are joined to nothing."""

from __future__ import annotations

import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.vocabulary import arguments, kind

Node = torch.fx.Node


def without_empty_parts(module: torch.fx.GraphModule) -> None:
    """Replace, in place, every concatenation of one tensor with tensors of shape [0] by a copy of that tensor.

    module: a functional graph with recorded values; torch.cat passes over a tensor of shape [0] whatever the others' rank.
    """
    for node in list(module.graph.nodes):
        if kind(node) != "cat":
            continue
        parts = arguments(node)["tensors"]
        if not isinstance(parts, list | tuple) or not all(isinstance(part, Node) for part in parts):
            continue
        kept = [part for part in parts if not _is_empty(part)]
        if len(kept) == 1 and len(parts) > 1:
            with module.graph.inserting_before(node):
                copied = module.graph.call_function(torch.ops.aten.clone.default, (kept[0],))
            copied.meta = dict(node.meta)
            node.replace_all_uses_with(copied)
            module.graph.erase_node(node)


def _is_empty(part: Node) -> bool:
    """True for a tensor of shape [0]; a length that only a run tells, as of `nonzero`, is not known to be none."""
    shape = shape_of(part)
    return shape is not None and len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0
