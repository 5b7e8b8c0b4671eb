"""Run the subgraph of a mask on small concrete inputs and compare it with the predicate that was proved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.ir.mask import Mask
from subquad.ir.site import Bias, View
from subquad.ir.vocabulary import arguments, kind
from subquad.kernels.evaluation import evaluate
from subquad.passes.recognize.concrete_run import PADDINGS, ConcreteRun
from subquad.passes.recognize.frame import digit, digits
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.normalisation import leads_to_exp
from subquad.passes.recognize.product import read_product
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_chain import ScoreReader
from subquad.passes.recognize.scores import Scores

Node = torch.fx.Node
SIZES = ((2, 7), (3, 12))
LOWEST = -3e4


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

    def compare(
        self, mask: Mask, scores: Scores, anchor: Node, reader: ScoreReader, beside: tuple[Bias, ...] = ()
    ) -> str:
        """The sentence of evidence; raises NotAttention when predicate and tensor differ anywhere.

        beside: masks that stay tensors; where one of them hides more, the predicate must not hide what is seen.
        """
        key = (mask.predicate, tuple(m.source for m in scores.masks), tuple(b.node for b in beside), kind(anchor))
        if key not in self._done:
            self._done[key] = self._compare(mask, scores, anchor, reader, beside)
        return self._done[key]

    def _compare(self, mask: Mask, scores: Scores, anchor: Node, reader: ScoreReader, beside: tuple[Bias, ...]) -> str:
        tried, exact = 0, True
        for batch, length in SIZES:
            for padding in PADDINGS if mask.tables else PADDINGS[:1]:
                try:
                    run = _Run(self, batch, length, padding, scores, anchor, reader)
                    seen, hides_more = run.visible(), any(run.hides(bias) for bias in (*beside, *scores.biases))
                    predicted = _predicted(mask, run, seen)
                except NotAttention:
                    raise
                except Exception as error:
                    return f"not cross-checked on concrete inputs ({type(error).__name__})"
                if not torch.equal(predicted & seen if hides_more else predicted, seen):
                    raise NotAttention(
                        f"the mask read as {mask.family} differs from its tensor at batch {batch}, length {length}, "
                        f"{padding} padding: a defect of the mask algebra, please report it",
                        anchor,
                        "defect",
                    )
                exact = exact and not hides_more
                tried += 1
        sizes = ", ".join(f"{b}×{t}" for b, t in SIZES)
        padded = "no, left and right padding" if mask.tables else "nothing to pad"
        says = "equals the tensor" if exact else "hides nothing that the tensor shows"
        return f"predicate {says} on {tried} concrete cases ({sizes}; {padded})"


def _predicted(mask: Mask, run: _Run, like: torch.Tensor) -> torch.Tensor:
    """The predicate on the indices of a tensor [B|1, H|1, Tq, Tk]."""
    environment: dict[str, Any] = {
        name: torch.arange(size).reshape([-1 if n == place else 1 for n in range(4)])
        for place, (name, size) in enumerate(zip(("b", "h", "q", "kv"), like.shape, strict=True))
    }
    for n, table in enumerate(mask.tables):
        environment[f"t{n}"] = run.value(table.node)
    for n, symbol in enumerate(mask.sizes):
        environment[f"s{n}"] = run.symbols[symbol]
    text = mask.text()
    value = True if text is None else evaluate(text, environment)
    return torch.as_tensor(value, dtype=torch.bool).expand_as(like)


class _Run(ConcreteRun):
    """One concrete evaluation of the nodes a mask depends on."""

    def __init__(
        self, check: MaskCheck, batch: int, length: int, padding: str, scores: Scores, anchor: Node, reader: ScoreReader
    ) -> None:
        super().__init__(check.module, check.examples, check.algebra.tensors, batch, length, padding)
        self.scores, self.anchor, self.reader = scores, anchor, reader

    def visible(self) -> torch.Tensor:
        """The boolean [B|1, H|1, Tq, Tk] of seen keys, by running the graph's own mask operations."""
        frame = self.reader.frame
        if kind(self.anchor) == "sdpa":
            seen, place = self._sdpa_visible(), digits(frame.shape)
        else:
            product = shape_of(self.scores.product) or ()
            zeros = torch.zeros([self.size(s) for s in product], dtype=torch.float64)
            read = read_product(self.scores.product)
            added = None if read is None else read.addend
            self.known[self.scores.product] = zeros if added is None else zeros + self.value(added).double()
            met_at = self.scores.masks[-1].met_at
            place = self.reader.places[met_at]
            along = next(n for n, index in enumerate(place) if digit(frame.key) in index.free_symbols)
            first = int(place[along] - digit(frame.key))
            lowest = 0 if leads_to_exp(met_at) else LOWEST
            seen = (self.value(met_at) > lowest).narrow(along, first, self.size(frame.shape[frame.key]))
            place = tuple(digit(frame.key) if n == along else index for n, index in enumerate(place))
        views = frame.views([2 if index != 0 else 1 for index in place], len(place), place)
        if views is None:
            raise ValueError("the scores have no canonical layout")
        return self._laid_out(seen, views)

    def hides(self, bias: Bias) -> bool:
        """True when a tensor beside the predicate hides keys too."""
        value = self.value(bias.node)
        return bias.role != "add" or bool((value.double() * bias.factor <= LOWEST).any())

    def _laid_out(self, tensor: torch.Tensor, views: tuple[View, ...]) -> torch.Tensor:
        for view in views:
            arguments_: list[Any] = [
                [self.size(s) for s in value] if view.name == "unflatten" and isinstance(value, tuple) else value
                for value in view.arguments
            ]
            if view.name == "expand":
                sizes = [-1] * tensor.dim()
                sizes[arguments_[0]] = self.size(arguments_[1])
                tensor = tensor.expand(sizes)
            else:
                tensor = getattr(tensor, view.name)(*arguments_)
        return tensor

    def _sdpa_visible(self) -> torch.Tensor:
        a = arguments(self.anchor)
        seen = torch.ones([self.size(s) for s in self.reader.frame.shape], dtype=torch.bool)
        if a["is_causal"]:
            seen = seen.tril()
        if a["mask"] is not None:
            mask = self.value(a["mask"])
            seen = seen & (mask if mask.dtype == torch.bool else mask > LOWEST)
        return seen
