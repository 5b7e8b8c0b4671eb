"""Run parts of a captured graph on made-up inputs at a chosen batch, length and padding, in its own or in double precision."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch.fx.node import map_aggregate, map_arg

from subquad.ir.graph import attribute, node_inputs, shape_of, value_of
from subquad.ir.vocabulary import kind

Node = torch.fx.Node
PADDINGS = ("none", "left", "right")


class ConcreteRun:
    """Values of nodes on made-up inputs, computed on demand.

    module: a captured graph with recorded values.  examples: input tensors by name; they tell masks (zeros and ones) from
    ids.  tensors: placeholders with known content.  double: every float32, float16 and bfloat16 becomes float64, casts
    included.  draw: each gives other random values.  `known` may be filled with values before asking, which cuts the graph there.
    """

    def __init__(
        self, module: torch.fx.GraphModule, examples: Mapping[str, torch.Tensor], tensors: Mapping[Node, torch.Tensor],
        batch: int, length: int, padding: str, double: bool = False, draw: int = 0,
    ) -> None:  # fmt: skip
        self.module, self.examples, self.tensors = module, examples, tensors
        self.batch, self.length, self.padding, self.double = batch, length, padding, double
        self.draw = draw
        self.symbols: dict[Any, int] = {}
        self.known: dict[Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self._assign(node)

    def _assign(self, node: Node) -> None:
        recorded = value_of(node)
        if isinstance(recorded, torch.SymInt):
            self.symbols.setdefault(recorded.node.expr, self.length)
            self.known[node] = self.symbols[recorded.node.expr]
            return
        for place, size in enumerate(shape_of(node) or ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                self.symbols.setdefault(size.node.expr, self.batch if place == 0 else self.length)

    def _generator(self, node: Node) -> torch.Generator:
        """Randomness of a node's own, so that its value does not depend on what was asked for before."""
        return torch.Generator().manual_seed(
            zlib.crc32(node.name.encode()) + self.batch * 1000 + self.length + self.draw * 1_000_003
        )

    def size(self, size: Any) -> int:
        """A symbolic size at this run's batch and length."""
        return int(size.node.expr.xreplace(self.symbols)) if isinstance(size, torch.SymInt) else int(size)

    def random(self, node: Node) -> torch.Tensor:
        """A standard normal tensor of the node's shape and dtype (float64 when double)."""
        recorded = value_of(node)
        shape = [self.size(s) for s in recorded.shape]
        drawn = torch.randn(shape, generator=self._generator(node), dtype=torch.float64)
        return drawn if self.double else drawn.to(recorded.dtype)

    def value(self, node: Node) -> Any:
        """The concrete value of a node, computing what it depends on first."""
        pending = [node]
        while pending:
            here = pending[-1]
            if here in self.known:
                pending.pop()
                continue
            missing = [n for n in node_inputs((here.args, here.kwargs)) if n not in self.known]
            if missing:
                pending.extend(missing)
                continue
            self.known[here] = self._evaluate(here)
            pending.pop()
        return self.known[node]

    def _widen(self, value: Any) -> Any:
        if not self.double:
            return value
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return value.double()
        if value in (torch.float32, torch.float16, torch.bfloat16):
            return torch.float64
        return value

    def _evaluate(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._widen(self._input(node))
        if node.op == "get_attr":
            return self._widen(attribute(self.module, str(node.target)))
        if kind(node) == "assertion":
            return None
        args = map_aggregate(map_arg(node.args, lambda n: self.known[n]), self._widen)
        kwargs = map_aggregate(map_arg(node.kwargs, lambda n: self.known[n]), self._widen)
        if node.op == "call_method":
            name = "double" if self.double and node.target in ("float", "half", "bfloat16") else str(node.target)
            return getattr(args[0], name)(*args[1:], **kwargs)
        if node.op == "call_module":
            leaf = self.module.get_submodule(str(node.target))
            widened = {name: self._widen(tensor) for name, tensor in leaf.state_dict().items()}
            return torch.func.functional_call(leaf, widened, args, kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _input(self, node: Node) -> torch.Tensor:
        if node in self.tensors:
            return self.tensors[node]
        recorded = value_of(node)
        shape = [self.size(s) for s in recorded.shape]
        if recorded.dtype.is_floating_point:
            return self.random(node)
        example = self.examples.get(str(node.target), self.examples.get(node.name))
        binary = recorded.dtype == torch.bool or (
            example is not None and example.numel() > 0 and bool(((example == 0) | (example == 1)).all())
        )
        if binary:
            return self._padded(shape).to(recorded.dtype)
        high = max(2, int(example.max()) + 1 if example is not None and example.numel() else 2)
        return torch.randint(0, high, shape, generator=self._generator(node), dtype=torch.int64).to(recorded.dtype)

    def _padded(self, shape: list[int]) -> torch.Tensor:
        mask = torch.ones(shape, dtype=torch.int64)
        if self.padding != "none" and mask.dim() >= 2:
            width = mask.shape[-1]
            for row in range(mask.shape[0]):
                hidden = min((row * 3 + 2) % width, width - 1)
                if self.padding == "left":
                    mask[row, ..., :hidden] = 0
                else:
                    mask[row, ..., width - hidden :] = 0
        return mask
