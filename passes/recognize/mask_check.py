"""Run the subgraph of a mask on small concrete inputs and compare it with the predicate that was proved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch.fx.node import map_arg

from subquad.ir.graph import attribute, node_inputs, shape_of, value_of
from subquad.ir.mask import Mask
from subquad.ir.vocabulary import arguments, kind
from subquad.kernels.expression import evaluate
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.score_chain import NotAttention, Scores

Node = torch.fx.Node
SIZES = ((2, 7), (3, 12))
PADDINGS = ("none", "left", "right")
LOWEST = -1e8


class MaskCheck:
    """Concrete cross-checks, one per distinct mask.

    A disagreement is a defect of the algebra and refuses the site; a subgraph that cannot run on made-up inputs only
    weakens the evidence, which then says so.
    """

    def __init__(self, module: torch.fx.GraphModule, examples: Mapping[str, torch.Tensor], algebra: MaskAlgebra) -> None:
        self.module, self.examples, self.algebra = module, examples, algebra
        self._done: dict[tuple[Any, ...], str] = {}

    def compare(self, mask: Mask, scores: Scores, anchor: Node) -> str:
        """The sentence of evidence; raises NotAttention when predicate and tensor differ anywhere."""
        key = (mask.predicate, scores.mask_nodes, kind(anchor))
        if key not in self._done:
            self._done[key] = self._compare(mask, scores, anchor)
        return self._done[key]

    def _compare(self, mask: Mask, scores: Scores, anchor: Node) -> str:
        tried = 0
        for batch, length in SIZES:
            for padding in PADDINGS:
                try:
                    run = _Run(self, batch, length, padding, scores, anchor)
                    seen = run.visible()
                except NotAttention:
                    raise
                except Exception as error:
                    return f"not cross-checked on concrete inputs ({type(error).__name__})"
                q = torch.arange(seen.shape[-2]).reshape(1, 1, -1, 1)
                kv = torch.arange(seen.shape[-1]).reshape(1, 1, 1, -1)
                b = torch.arange(seen.shape[0]).reshape(-1, 1, 1, 1)
                h = torch.arange(seen.shape[1]).reshape(1, -1, 1, 1)
                environment: dict[str, Any] = {"b": b, "h": h, "q": q, "kv": kv}
                for n, table in enumerate(mask.tables):
                    environment[f"t{n}"] = run.value(table.node)
                for n, symbol in enumerate(mask.sizes):
                    environment[f"s{n}"] = run.symbols[symbol]
                text = mask.text()
                predicted = torch.ones_like(seen) if text is None else evaluate(text, environment).expand_as(seen)
                if not torch.equal(predicted.bool(), seen):
                    raise NotAttention(
                        f"the mask read as {mask.family} differs from its tensor at batch {batch}, length {length}, "
                        f"{padding} padding: a defect of the mask algebra, please report it",
                        anchor,
                    )
                tried += 1
        sizes = ", ".join(f"{b}×{t}" for b, t in SIZES)
        return f"predicate equals the tensor on {tried} concrete cases ({sizes}; no, left and right padding)"


class _Run:
    """One concrete evaluation of the nodes a mask depends on."""

    def __init__(self, check: MaskCheck, batch: int, length: int, padding: str, scores: Scores, anchor: Node) -> None:
        self.check, self.batch, self.length, self.padding = check, batch, length, padding
        self.scores, self.anchor = scores, anchor
        self.symbols: dict[Any, int] = {}
        self.known: dict[Node, Any] = {}
        self.generator = torch.Generator().manual_seed(batch * 1000 + length)
        for node in check.module.graph.nodes:
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

    def _size(self, size: Any) -> int:
        return int(size.node.expr.xreplace(self.symbols)) if isinstance(size, torch.SymInt) else int(size)

    def visible(self) -> torch.Tensor:
        """The boolean [B, H, Tq, Tk] of seen keys, by running the graph's own mask operations."""
        if kind(self.anchor) == "sdpa":
            return self._sdpa_visible()
        product = shape_of(self.scores.product) or ()
        self.known[self.scores.product] = torch.zeros([self._size(s) for s in product], dtype=torch.float64)
        seen = self.value(arguments(self.anchor)["x"]) > LOWEST
        return seen if seen.dim() == 4 else seen.unsqueeze(1)

    def _sdpa_visible(self) -> torch.Tensor:
        a = arguments(self.anchor)
        q, k = shape_of(a["q"]) or (), shape_of(a["k"]) or ()
        shape = [*(self._size(s) for s in q[:-1]), self._size(k[-2])]
        seen = torch.ones(shape, dtype=torch.bool)
        if a["is_causal"]:
            seen = seen.tril()
        if a["mask"] is not None:
            mask = self.value(a["mask"])
            seen = seen & (mask if mask.dtype == torch.bool else mask > LOWEST)
        return seen if seen.dim() == 4 else seen.unsqueeze(1)

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

    def _evaluate(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node in self.check.algebra.tensors:
            return self.check.algebra.tensors[node]
        if node.op == "get_attr":
            return attribute(self.check.module, str(node.target))
        args = map_arg(node.args, lambda n: self.known[n])
        kwargs = map_arg(node.kwargs, lambda n: self.known[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.check.module.get_submodule(str(node.target))(*args, **kwargs)
        if kind(node) == "assertion":
            return None
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _input(self, node: Node) -> torch.Tensor:
        if node in self.check.algebra.tensors:
            return self.check.algebra.tensors[node]
        recorded = value_of(node)
        shape = [self._size(s) for s in recorded.shape]
        if recorded.dtype.is_floating_point:
            return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(recorded.dtype)
        example = self.check.examples.get(str(node.target), self.check.examples.get(node.name))
        binary = recorded.dtype == torch.bool or (
            example is not None and example.numel() > 0 and bool(((example == 0) | (example == 1)).all())
        )
        if binary:
            return self._padding(shape).to(recorded.dtype)
        high = max(2, int(example.max()) + 1 if example is not None and example.numel() else 2)
        return torch.randint(0, high, shape, generator=self.generator, dtype=torch.int64).to(recorded.dtype)

    def _padding(self, shape: list[int]) -> torch.Tensor:
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
