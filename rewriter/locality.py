"""Prove that a captured graph treats tokens independently everywhere outside its attention operators.

Abstract interpretation: every value either has no token axis, or one axis (possibly merged with others, as in [B·T, D])
that runs over the tokens.  An operation keeps the proof when output token t depends on input tokens t alone; a running sum
over integers that depend on the inputs only is allowed as well and becomes a value computed from the whole history.
"""

from __future__ import annotations

import operator
from typing import Any

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
    tensor_inputs,
    tensors_of,
)

Node = torch.fx.Node


def prove_locality(module: torch.fx.GraphModule, others: bool = False) -> Locality:
    """Analyse an ATen graph f(token ids [B, T], ...) whose attention sites are subquad operators.

    others: the model may take inputs beside those over the T tokens of its logits [B, T, V], such as what an encoder made.
    Raises NotIncremental at the first operation that mixes tokens, or that the analysis does not know.
    """
    proof = Locality()
    if others:
        _sort_inputs(proof, module.graph)
    for node in ancestors(n for n in module.graph.nodes if n.op in ("output", "placeholder")):
        if node.op == "placeholder":
            _placeholder(proof, node)
        elif node.op == "get_attr":
            proof.closed.add(node)
            proof.placed.add(node)
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


def _sort_inputs(proof: Locality, graph: torch.fx.Graph) -> None:
    """Tell the inputs over the tokens of the logits from those that stay as they are while tokens join."""
    output = next(iter(reversed(graph.nodes)))
    shapes = [value_of(n).shape for n in output.all_input_nodes if isinstance(value_of(n), torch.Tensor)]
    growing = {expression_of(shape[1]) for shape in shapes if len(shape) == 3} - {1}
    inputs = [n for n in graph.find_nodes(op="placeholder") if isinstance(value_of(n), torch.Tensor)]
    over = [n for n in inputs if any(expression_of(size) in growing for size in value_of(n).shape)]
    proof.given = [n for n in inputs if n not in over] if over else []
    proof.batch = set().union(*(expression_of(value_of(n).shape[0]).free_symbols for n in over))


def _placeholder(proof: Locality, node: Node) -> None:
    if node in proof.given:
        proof.fixed.add(node)
        return
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
    if _is_fixed(proof, node):
        proof.fixed.add(node)
        return
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
    if (other := next((n for n in node.all_input_nodes if n in proof.fixed), None)) is not None:
        source = next((n.name for n in ancestors([other]) if n in proof.given), other.name)
        refuse(node, f"`{packet}` mixes tokens with what is computed from `{source}`, outside of cross attention.")
    if all(n in proof.placed for n in tensor_inputs(node)):
        proof.placed.add(node)
        if any(n in proof.pairs for n in node.all_input_nodes) or _pairs(proof, value):
            proof.pairs.add(node)
            return
    elif any(n in proof.pairs for n in node.all_input_nodes):
        refuse(node, f"`{packet}` reads a table of tokens by tokens outside attention.")
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


def _pairs(proof: Locality, value: Any) -> bool:
    """Whether a tensor has two axes of tokens."""
    return isinstance(value, torch.Tensor) and sum(proof.depends_on_length(size) for size in value.shape) > 1


def _is_fixed(proof: Locality, node: Node) -> bool:
    """Whether a value depends on the given inputs, and neither on tokens nor on their number."""
    if not proof.given or reads_tokens(proof, node) or reads_length(proof, node):
        return False
    value = value_of(node)
    if isinstance(value, torch.SymInt):
        symbols = expression_of(value).free_symbols
        return bool(symbols) and not symbols & (proof.tokens | proof.batch)
    return any(n in proof.fixed for n in node.all_input_nodes)


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
    if proof.axes.get(named["q"]) == TokenAxis(1) and {*keys, *values} <= proof.fixed:
        _cross(proof, node, named)
        return
    for n in (named["q"], *keys, *values):
        if proof.axes.get(n) != TokenAxis(1):
            refuse(node, "an attention operator reads tokens that are not all on axis 1 (is it cross attention?).")
    proof.axes[node] = TokenAxis(1)


def _cross(proof: Locality, node: Node, named: dict[str, Any]) -> None:
    """Attention of tokens to what is fixed: a token reads all of it, whatever tokens stand beside it."""
    others = {n for n in node.all_input_nodes if n is not named["q"] and (n in proof.axes or n in proof.pairs)}
    if others or reads_length(proof, node):
        refuse(node, "the mask or bias of a cross attention is a table over tokens, which is not understood.")
    if node.target is not torch.ops.subquad.softmax_attention.default:
        refuse(node, "a recurrence over what is fixed is not understood.")
    proof.axes[node] = TokenAxis(1)
    proof.cross.append(node)
