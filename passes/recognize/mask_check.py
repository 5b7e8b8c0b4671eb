"""Run the subgraph of a mask on small concrete inputs and compare it with the predicate that was proved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.mask import Mask
from subquad.ir.vocabulary import arguments, kind
from subquad.kernels.expression import evaluate
from subquad.passes.recognize.concrete_run import PADDINGS, ConcreteRun
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.score_chain import NotAttention, Scores

Node = torch.fx.Node
SIZES = ((2, 7), (3, 12))
LOWEST = -1e8


class MaskCheck:
    """Concrete cross-checks, one per distinct mask.

    A disagreement is a defect of the algebra and refuses the site; a subgraph that cannot run on made-up inputs only
    weakens the evidence, which then says so.
    """

    def __init__(
        self, module: torch.fx.GraphModule, examples: Mapping[str, torch.Tensor], algebra: MaskAlgebra
    ) -> None:
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
            for padding in PADDINGS if mask.tables else PADDINGS[:1]:
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
        padded = "no, left and right padding" if mask.tables else "nothing to pad"
        return f"predicate equals the tensor on {tried} concrete cases ({sizes}; {padded})"


class _Run(ConcreteRun):
    """One concrete evaluation of the nodes a mask depends on."""

    def __init__(self, check: MaskCheck, batch: int, length: int, padding: str, scores: Scores, anchor: Node) -> None:
        super().__init__(check.module, check.examples, check.algebra.tensors, batch, length, padding)
        self.scores, self.anchor = scores, anchor

    def visible(self) -> torch.Tensor:
        """The boolean [B, H, Tq, Tk] of seen keys, by running the graph's own mask operations."""
        if kind(self.anchor) == "sdpa":
            return self._sdpa_visible()
        product = shape_of(self.scores.product) or ()
        self.known[self.scores.product] = torch.zeros([self.size(s) for s in product], dtype=torch.float64)
        seen = self.value(arguments(self.anchor)["x"]) > LOWEST
        return seen if seen.dim() == 4 else seen.unsqueeze(1)

    def _sdpa_visible(self) -> torch.Tensor:
        a = arguments(self.anchor)
        q, k = shape_of(a["q"]) or (), shape_of(a["k"]) or ()
        seen = torch.ones([*(self.size(s) for s in q[:-1]), self.size(k[-2])], dtype=torch.bool)
        if a["is_causal"]:
            seen = seen.tril()
        if a["mask"] is not None:
            mask = self.value(a["mask"])
            seen = seen & (mask if mask.dtype == torch.bool else mask > LOWEST)
        return seen if seen.dim() == 4 else seen.unsqueeze(1)
