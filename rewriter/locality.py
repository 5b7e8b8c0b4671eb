"""Prove that a captured graph treats tokens independently everywhere outside its attention operators.

Abstract interpretation: every value either has no token axis, or one axis (possibly merged with others, as in [B·T, D])
that runs over the tokens.  An operation keeps the proof when output token t depends on input tokens t alone; a running sum
over integers that depend on the inputs only is allowed as well and becomes a value computed from the whole history.
"""

from __future__ import annotations

import operator

import torch
import torch.fx

from subquad.ir.graph import ancestors, value_of
from subquad.ir.refusal import Refusal
from subquad.locality_rules import RULES, broadcast
from subquad.token_axis import (
    Locality,
    NotIncremental,
    TokenAxis,
    copy_axis,
    expression_of,
    is_floating,
    is_pointwise,
    is_uniform,
    name_of,
    operator_arguments,
    reads_length,
    reads_tokens,
    refuse,
    tensors_of,
)

Node = torch.fx.Node


def prove_locality(module: torch.fx.GraphModule) -> Locality:
    """Analyse an ATen graph f(token ids [B, T], ...) whose attention sites are subquad operators.

    Raises NotIncremental at the first operation that mixes tokens, or that the analysis does not know.
    """
    proof = Locality()
    for node in ancestors(n for n in module.graph.nodes if n.op in ("output", "placeholder")):
        if node.op == "placeholder":
            _placeholder(proof, node)
        elif node.op == "get_attr":
            proof.closed.add(node)
        elif node.op == "call_function":
            _call(proof, node)
        elif node.op != "output":
            refuse(
                node, f"the graph holds a {node.op} node, which only an ATen graph from torch.export may be without."
            )
    if not proof.inputs:
        raise NotIncremental(
            Refusal("", "decode", "no input of the model has the shape [batch, tokens] with a symbolic length.")
        )
    return proof


def _placeholder(proof: Locality, node: Node) -> None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        refuse(node, "the model takes a number as input, which an incremental decoder cannot give.")
    if value.dim() != 2 or value.is_floating_point() or not isinstance(value.shape[1], torch.SymInt):
        refuse(node, f"the input `{node.name}` is not an integer tensor [batch, tokens] with a symbolic length.")
    proof.tokens |= expression_of(value.shape[1]).free_symbols
    proof.axes[node] = TokenAxis(1)
    proof.inputs.append(node)
    proof.closed.add(node)


def _call(proof: Locality, node: Node) -> None:
    value = value_of(node)
    if all(n in proof.closed for n in node.all_input_nodes) and not is_floating(value):
        proof.closed.add(node)
    if isinstance(value, (torch.SymInt, int, float, bool, torch.SymBool, torch.SymFloat)):
        _number(proof, node)
        return
    packet = name_of(node)
    if node.target is operator.getitem:
        copy_axis(proof, node, node.args[0])
        return
    if packet.startswith("_assert") or packet.startswith("sym_constrain"):
        return
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "subquad":
        _attention(proof, node)
        return
    rule = RULES.get(packet)
    if rule is None and is_pointwise(node):
        rule = broadcast
    if rule is None:
        if reads_tokens(proof, node) or reads_length(proof, node):
            refuse(node, f"`{packet}` is not known to treat tokens independently.")
        return
    _check_numbers(proof, node, packet)
    rule(proof, node)
    _check_shape(proof, node)


def _number(proof: Locality, node: Node) -> None:
    if name_of(node) == "sym_size" or not isinstance(node.target, torch._ops.OpOverload):
        return
    if reads_tokens(proof, node):
        refuse(node, f"`{name_of(node)}` reads a number out of a tensor over tokens.")


SHAPED = {
    "view", "reshape", "_unsafe_view", "expand", "full", "ones", "zeros", "empty", "new_ones", "new_zeros", "new_full",
    "new_empty", "arange", "slice", "unflatten", "narrow",
}  # fmt: skip
"""Operations that may take the sequence length as a size."""


def _check_numbers(proof: Locality, node: Node, packet: str) -> None:
    if packet not in SHAPED and reads_length(proof, node):
        refuse(node, f"`{packet}` computes with the length of the sequence, which changes with every token.")


def _check_shape(proof: Locality, node: Node) -> None:
    """Whatever axis of the result varies with the length must be the tracked token axis."""
    for value, axis in tensors_of(proof, node):
        long = [n for n, size in enumerate(value.shape) if proof.depends_on_length(size)]
        tracked = axis.axis if axis else None
        if len(long) > 1:
            refuse(
                node,
                f"`{name_of(node)}` makes a table of tokens by tokens {list(map(str, value.shape))} outside attention.",
            )
        if long and long[0] != tracked and not is_uniform(proof, node):
            refuse(node, f"`{name_of(node)}` moves tokens to another axis in a way that is not understood.")


def _attention(proof: Locality, node: Node) -> None:
    named = operator_arguments(node)
    keys = named["k"] if isinstance(named["k"], (list, tuple)) else [named["k"]]
    values = named["v"] if isinstance(named["v"], (list, tuple)) else [named["v"]]
    for n in (named["q"], *keys, *values):
        if proof.axes.get(n) != TokenAxis(1):
            refuse(node, "an attention operator reads tokens that are not all on axis 1 (is it cross attention?).")
    proof.axes[node] = TokenAxis(1)
