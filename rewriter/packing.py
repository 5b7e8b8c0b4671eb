"""Put a decoder's weights into one storage in the order they are read, projections of one input side by side."""

from __future__ import annotations

import mmap
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

Node = torch.fx.Node
Groups = dict[tuple[str, ...], str]
LEAST = 8 << 20
"""Weights of fewer bytes than this are not worth large pages."""


def projection_groups(graph: torch.fx.Graph, weights: dict[str, Tensor]) -> Groups:
    """Names of projection weights (and biases) that read the same input, by the name of their packed form."""
    by_input: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.target is torch.ops.aten.linear.default and all(n.op == "get_attr" for n in _parameters(node)):
            by_input.setdefault(_input(node), []).append(node)
    groups: Groups = {}
    taken: set[int] = set()
    for nodes in by_input.values():
        names, biases = _names(nodes)
        tensors = [weights[name] for name in (*names, *biases)]
        alike = len({(t.dtype, t.shape[1:]) for t in tensors[: len(names)]}) == 1 and len(biases) in (0, len(names))
        if (
            len(nodes) < 2
            or not alike
            or len({id(t) for t in tensors}) < len(tensors)
            or taken & {id(t) for t in tensors}
        ):
            continue
        taken |= {id(t) for t in tensors}
        for part in (names, biases):
            if part:
                groups[part] = f"packed_{len(groups)}"
    return groups


def fuse_projections(module: torch.fx.GraphModule, groups: Groups) -> None:
    """Replace the projections of each group by one and a split, in place."""
    graph = module.graph
    by_input: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            by_input.setdefault(_input(node), []).append(node)
    for x, nodes in by_input.items():
        names, biases = _names(nodes)
        if names not in groups:
            continue
        sizes = [_rows(module, name) for name in names]
        for part in filter(None, (names, biases)):
            module.register_buffer(groups[part], torch.empty(0, device="meta"))
        with graph.inserting_before(nodes[0]):
            parameters = [graph.create_node("get_attr", groups[part]) for part in (names, biases) if part]
            joint = graph.call_function(torch.ops.aten.linear.default, (x, *parameters))
            parts = graph.call_function(torch.ops.aten.split_with_sizes.default, (joint, sizes, -1))
            joint.meta.update(nodes[0].meta)
            for n, node in enumerate(nodes):
                piece = graph.call_function(operator.getitem, (parts, n))
                piece.meta.update(node.meta)
                node.replace_all_uses_with(piece)
        for node in nodes:
            graph.erase_node(node)
    graph.eliminate_dead_code(
        lambda n: n.op in ("placeholder", "output") or n.target is torch.ops.aten.index_copy_.default
    )


def _input(linear: Node) -> Node:
    return linear.all_input_nodes[0]


def _parameters(linear: Node) -> list[Node]:
    """Weight and bias of a projection."""
    return [n for n in linear.args[1:] if isinstance(n, Node)]


def _names(nodes: list[Node]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the weights and of the biases of several projections."""
    parameters = [[str(n.target) for n in _parameters(node)] for node in nodes]
    return tuple(p[0] for p in parameters), tuple(p[1] for p in parameters if len(p) > 1)


def _rows(module: torch.fx.GraphModule, name: str) -> int:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return int(value.shape[0])


def pack(weights: dict[str, Tensor], order: Sequence[str], groups: Groups) -> dict[str, Tensor]:
    """Move the weights into one storage in the order of first use and return them with the packed forms added.

    Each parameter keeps its object, shape and values; its data becomes a view of the storage, so there is one copy of the
    weights.  On CPU the storage is advised to large pages: reading it is then about a quarter faster (measured).
    """
    packed_of = {name: (part, packed) for part, packed in groups.items() for name in part}
    sequence: list[tuple[str, ...]] = []
    for name in order:
        part = packed_of[name][0] if name in packed_of else (name,)
        if part not in sequence and name in weights:
            sequence.append(part)
    seen: set[int] = set()
    unique = []
    for part in sequence:
        if id(weights[part[0]]) not in seen and all(isinstance(weights[n], torch.nn.Parameter) for n in part):
            seen |= {id(weights[n]) for n in part}
            unique.append(part)
    result = dict(weights)
    for key in {(weights[p[0]].dtype, weights[p[0]].device) for p in unique}:
        parts = [p for p in unique if (weights[p[0]].dtype, weights[p[0]].device) == key]
        _move(result, parts, groups, *key)
    return result


def _move(
    weights: dict[str, Tensor], parts: list[tuple[str, ...]], groups: Groups, dtype: torch.dtype, device: torch.device
) -> None:
    grain = 64 // dtype.itemsize
    starts, total = [], 0
    for part in parts:
        starts.append(total)
        total += -(-sum(weights[name].numel() for name in part) // grain) * grain
    storage = _storage(total, dtype, device)
    with torch.no_grad():
        for part, start in zip(parts, starts, strict=True):
            at = start
            for name in part:
                parameter = weights[name]
                view = storage[at : at + parameter.numel()].view(parameter.shape)
                view.copy_(parameter)
                parameter.data = view
                at += parameter.numel()
            if part in groups:
                weights[groups[part]] = storage[start:at].view(-1, *weights[part[0]].shape[1:])


def _storage(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = count * dtype.itemsize
    if device.type != "cpu" or size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device=device)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=dtype, count=count)
