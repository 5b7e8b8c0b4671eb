"""Name what behaves like attention and is no anchor of recognition: exponentials of scores, and operations known by name only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx

from subquad.ir.graph import shape_of, users_of
from subquad.ir.refusal import Refusal, refuse
from subquad.ir.site import Site
from subquad.ir.vocabulary import kind
from subquad.passes.canonicalize.torch_layers import KEPT, is_layer
from subquad.passes.recognize.normalisation import power_of
from subquad.passes.recognize.product import PRODUCTS
from subquad.passes.recognize.provenance_terms import word
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_path import VIEWS, is_score_product, paths_to_products

Node = torch.fx.Node
BETWEEN = VIEWS | {"cast", "dropout", "mul", "div", "masked_fill", "where"}
UNSUMMED = "exponentials of scores weight values, and are divided by nothing that is read as their sum over all keys"


def loose_ends(graph: torch.fx.Graph, sites: Iterable[Site], refused: Iterable[Node]) -> list[Refusal]:
    """A refusal for each exponential of a product of activations that weights values, is summed or shifted, and belongs to no
    other finding, and for each call whose name tells of a softmax or of attention and whose inside is not known.

    refused: the anchors that have a refusal already.  graph: with recorded values.
    """
    known = {node for site in sites for node in site.absorbed} | set(refused)
    found = []
    for node in graph.nodes:
        if power_of(node) is not None and _weights_values(node, known) and _is_of_scores(node):
            found.append(refuse(node, "softmax", UNSUMMED, "denominator"))
        elif is_layer(node):
            found.append(
                refuse(node, "attention", f"`{word(node)}` could not be written out: {node.meta.get(KEPT, '')}")
            )
        elif node not in known and _is_named(node):
            reason = f"`{word(node)}` is one operation here, and what it does with the scores is not known"
            found.append(refuse(node, "attention", reason, "whole"))
    return found


def _weights_values(node: Node, known: set[Node]) -> bool:
    """True for what meets a product of activations, and is summed too, without passing anything that is known already."""
    frontier, seen = [node], {node}
    for here in frontier:
        if here in known:
            return False
        for user in users_of(here):
            if kind(user) in BETWEEN and user not in seen:
                seen.add(user)
                frontier.append(user)
    users = [user for here in frontier for user in users_of(here)]
    products = [user for user in users if kind(user) in PRODUCTS]
    summed = any(kind(user) == "sum" for user in users) or kind((power_of(node) or (None,))[0]) == "sub"
    return summed and any(is_score_product(product) for product in products) and not known.intersection(products)


def _is_of_scores(node: Node) -> bool:
    try:
        return bool(paths_to_products((power_of(node) or (None,))[0]))
    except NotAttention:
        return False


def _is_named(node: Node) -> bool:
    """True for an operation of torch or of a library, none of ours, that is called a softmax or an attention."""
    if node.op not in ("call_function", "call_method") or kind(node) or isinstance(node.target, _REGIONS):
        return False
    if getattr(node.target, "namespace", "") == "subquad" or (shape_of(node) is None and not node.users):
        return False
    name = word(node).lower()
    return ("softmax" in name or "attention" in name or "flash_attn" in name) and "backward" not in name


_REGIONS = torch._ops.HigherOrderOperator
