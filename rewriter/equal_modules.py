"""Tell which modules a captured graph runs alike, and give the capture of one of them to another."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import nn

from subquad.captured import Capture
from subquad.graph_copy import carry_site, copy_capture
from subquad.ir.graph import attribute, hang, module_path, value_of
from subquad.ir.site import Site
from subquad.lifting import CONSTANTS

Node = torch.fx.Node


class Footprints:
    """What one captured graph computes inside each module, comparable between modules."""

    def __init__(self, whole: Capture) -> None:
        self.whole = whole
        self.nodes = [(node, module_path(node)) for node in whole.graph.graph.nodes]

    def of(self, path: str) -> str:
        """Equal for two modules of one class in which the graph runs the same operations on tensors of the same shapes.

        Parameters count by shape, buffers and constants by content.
        """
        digest = hashlib.sha256(type(self.whole.root.get_submodule(path)).__qualname__.encode())
        inside: dict[Node, int] = {}
        for node, where in self.nodes:
            if not (where == path or where.startswith(f"{path}.")) or node.op == "get_attr":
                continue
            words = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _Word(self._operand(n, path, inside)))
            digest.update(f"{where[len(path) :]} {node.op} {node.target} {words} {_shape(node)}\n".encode())
            inside[node] = len(inside)
        return digest.hexdigest()

    def _operand(self, node: Node, path: str, inside: dict[Node, int]) -> str:
        if node in inside:
            return f"%{inside[node]}"
        if node.op != "get_attr":
            return f"outer {_shape(node)}"
        name, value = str(node.target), attribute(self.whole.graph, str(node.target))
        name = name[len(path) :] if name.startswith(f"{path}.") else name.replace(CONSTANTS, "constant")
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return f"{'constant' if name.startswith('constant') else name} {hashlib.sha256(content).hexdigest()}"
        return f"{name} {_shape(node)}"


class _Word(str):
    """Text that prints without quotes inside nested arguments."""

    def __repr__(self) -> str:
        return str(self)


def _shape(node: Node) -> str:
    value = value_of(node)
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else str(value)


def moved_capture(capture: Capture, owner: nn.Module, sites: list[Site]) -> tuple[Capture, list[Site]]:
    """The capture of one module on the parameters of another that runs alike, and its sites there.

    Raises AttributeError when the other module lacks one of the tensors.
    """
    copied, mapping = copy_capture(capture)
    for name in _own_names(capture):
        hang(copied.graph, name, attribute(owner, name))
    return replace(copied, root=owner), [carry_site(site, mapping) for site in sites]


def _own_names(capture: Capture) -> list[str]:
    named: list[tuple[str, Any]] = [*capture.graph.named_parameters(remove_duplicate=False)]
    named += capture.graph.named_buffers(remove_duplicate=False)
    return [name for name, _ in named if not name.startswith(f"{CONSTANTS}.")]


def can_move(capture: Capture) -> bool:
    """False for a capture whose guards read tensors of the module that was captured."""
    return capture.guards.values is None
