"""A captured forward as a value: the graph, the module it shares parameters with, and how to call it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from subquad.capture_guards import Guards
from subquad.capture_objects import Objects
from subquad.ir.graph import attribute


@dataclass
class Capture:
    """A captured forward.

    graph: GraphModule whose parameters and buffers are the root's own objects; placeholders are the tensor inputs.
    root: the user's module (for a .pt2 program, a module tree made from its state).  inputs: placeholder names in order,
    which are the forward's argument names.  constants: non-tensor arguments the graph was captured with.
    out_spec: pytree of the original's output; the graph returns its leaves as a tuple.
    dialect: "aten" (torch.export) or "torch" (Dynamo, symbolic_trace).  example: the tensors captured with.
    guards: what the inputs must be for the graph to be the forward's.  notes: sentences on what was fixed or adapted.
    arguments: the call that was captured, None where there was none (a program, a Dynamo graph).  objects: which of them
    are lists of tensors for an object of another class.
    """

    graph: torch.fx.GraphModule
    root: torch.nn.Module
    inputs: tuple[str, ...]
    dialect: str
    example: dict[str, torch.Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    out_spec: pytree.TreeSpec | None = None
    known_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    guards: Guards = field(default_factory=Guards)
    notes: list[str] = field(default_factory=list)
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    objects: Objects = field(default_factory=Objects)

    def call(self, root: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Call a module of the root's kind with these tensors, by input name, where the example had its own."""
        if self.arguments is None or isinstance(root, torch.fx.GraphModule | ProgramModule):
            return root(*[tensors[name] for name in self.inputs])
        leaves, structure = pytree.tree_flatten(self.arguments)
        names = iter(self.inputs)
        filled = [tensors[next(names)] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = self.objects.restored(*pytree.tree_unflatten(filled, structure))
        return root(*args, **kwargs)

    def written(self) -> list[str]:
        """The names of the root's parameters and buffers that a call of the forward changes."""
        copies = [node for node in self.graph.graph.nodes if node.target is torch.ops.aten.copy_.default]
        return [
            str(n.args[0].target) for n in copies if isinstance(n.args[0], torch.fx.Node) and n.args[0].op == "get_attr"
        ]

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Inside the block the forward may be called; what it changes in the root's buffers is put back at the end."""
        held = [attribute(self.graph, name) for name in self.written()]
        kept = [tensor.detach().clone() for tensor in held]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(held, kept, strict=True):
                    tensor.copy_(value)


class ProgramModule(torch.nn.Module):
    """An exported program as a plain module tree: its parameters under their names, its graph as the forward.

    Called with the tensors the program takes, in order or by name; returns what the program returns.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program's graph on this module's parameters."""
        capture: Capture = self.__dict__["_subquad_program"]
        inputs = ordered_inputs(capture, args, kwargs)
        if why := capture.guards.broken(inputs):
            raise ValueError(f"the program does not hold for this call: {why}.")
        leaves = capture.graph(*inputs)
        return leaves if capture.out_spec is None else pytree.tree_unflatten(list(leaves), capture.out_spec)


def ordered_inputs(capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Positional and named tensors in the order of the capture's placeholders; raises TypeError when one is missing."""
    given = dict(zip(capture.inputs, args, strict=False)) | {k: v for k, v in kwargs.items() if k in capture.inputs}
    missing = [name for name in capture.inputs if name not in given]
    if missing or len(args) > len(capture.inputs):
        raise TypeError(
            f"the program takes {', '.join(capture.inputs)}; this call gives {len(args)} and {sorted(kwargs)}"
        )
    return [given[name] for name in capture.inputs]
