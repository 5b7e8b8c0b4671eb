"""Judges, while a model runs and without its graph, which executed softmaxes are attention: a second opinion on recognition."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from softmax_counter import COUNTED, SKIPPED, SoftmaxCounter, user_lines
from torch import nn
from torch.utils import _pytree as pytree

SKIPPED.add(__file__)
PRODUCTS = frozenset(["bmm", "mm", "addmm", "baddbmm", "addbmm", "matmul", "dot", "mv"])
MIXERS = frozenset(
    ["convolution", "embedding", "native_layer_norm", "native_group_norm", "native_batch_norm", "linear", "cumsum"]
)
"""Operations behind which scores are no scores and probabilities no probabilities any more."""
REDUCTIONS = frozenset(["sum", "mean", "amax", "max", "argmax", "topk", "sort", "logsumexp", "any", "all"])
PICKS = frozenset(["topk", "sort", "max"])


@dataclass(frozen=True)
class Traits:
    """What is known of a tensor: whether it depends on the model's inputs, and which scores, probabilities and weighted
    values its elements are, behind views and pointwise operations.

    scores: sizes of the axes of a product that no input reaches ("learned" keys), one entry for each product of vectors;
    an empty tuple for a product of two tensors that both depend on inputs.
    """

    data: bool = False
    scores: frozenset[tuple[int, ...]] = frozenset()
    probabilities: frozenset[int] = frozenset()
    weighted: frozenset[int] = frozenset()


@dataclass
class Seen:
    """One executed softmax: under which lines, innermost first, over how many entries, what its input was, and whether it
    weighted values.
    """

    kind: str
    lines: list[str]
    size: int
    scores: frozenset[tuple[int, ...]]
    weights_values: bool = False

    @property
    def verdict(self) -> str:
        """ "attention", "learned" (it weights values, but queries or keys are no product of the input's) or "other"."""
        if self.kind == "sdpa":
            return "attention"
        if not self.weights_values:
            return "other"
        if () in self.scores:
            return "attention"
        return "learned" if any(self.size not in learned for learned in self.scores) else "other"


class AttentionWitness(SoftmaxCounter):
    """Inside the block every softmax is followed: from which product its scores came, and what its probabilities met.

    A softmax is attention when its input is, behind pointwise operations and views, a product of two tensors that both
    depend on the model's inputs, and its probabilities are contracted over the softmax's axis with a tensor that does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.traits: dict[int, Traits] = {}
        self.alive: list[torch.Tensor] = []
        for tensor in (*model.parameters(), *model.buffers()):
            self._set(tensor, Traits())

    def verdicts(self) -> Counter[tuple[str, str]]:
        """How many softmaxes of each verdict each source line executed, itself or in what it called."""
        return Counter((line, seen.verdict) for seen in self.seen for line in set(seen.lines))

    def given(self, inputs: Iterable[Any]) -> AttentionWitness:
        """The same witness, told which tensors are the model's inputs."""
        for tensor in pytree.tree_leaves(list(inputs)):
            if isinstance(tensor, torch.Tensor):
                self._set(tensor, Traits(data=True))
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = getattr(getattr(func, "overloadpacket", func), "__name__", "").rstrip("_")
        tensors = [x for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        made = self._after(name, args, tensors, result)
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._set(x, made)
        return result

    def _after(self, name: str, args: Any, tensors: list[torch.Tensor], result: Any) -> Traits:
        known = [self.traits.get(id(x), Traits()) for x in tensors]
        data = any(t.data for t in known)
        counted = COUNTED.get(name)
        if counted is not None:
            return self._softmax(counted, args, known, data)
        if name in PRODUCTS:
            return self._product(tensors[-2:], known[-2:], data)
        if name in MIXERS:
            return Traits(data)
        union = Traits(
            data,
            frozenset().union(*(t.scores for t in known)),
            frozenset().union(*(t.probabilities for t in known)),
            frozenset().union(*(t.weighted for t in known)),
        )
        if name == "mul" and len(known) == 2:
            return self._multiplied(tensors, known, union, result)
        if name in REDUCTIONS:
            return self._reduced(name, args, union)
        return union

    def _softmax(self, counted: str, args: Any, known: list[Traits], data: bool) -> Traits:
        size = 0 if counted == "sdpa" else int(args[0].shape[args[1]]) if args[0].dim() else 1
        scores = frozenset().union(*(t.scores for t in known[:1]))
        self.seen.append(Seen(counted, user_lines(sys._getframe(1)), size, scores))
        if counted == "sdpa":
            return Traits(data)
        return Traits(data, probabilities=frozenset([len(self.seen) - 1]))

    def _product(self, tensors: list[torch.Tensor], known: list[Traits], data: bool) -> Traits:
        left, right = known
        for weights, of_weights, of_values, axis in ((tensors[0], left, right, -1), (tensors[1], right, left, -2)):
            if of_weights.probabilities and of_values.data and _are_shares(weights, axis):
                self._weights(of_weights.probabilities)
                return Traits(data)
        if not data:
            return Traits()
        learned = [x for x, t in zip(tensors, known, strict=True) if not t.data]
        scores = tuple(int(n) for x in learned for n in x.shape[-2:])
        return Traits(data, scores=frozenset([scores]))

    def _multiplied(self, tensors: list[torch.Tensor], known: list[Traits], union: Traits, result: Any) -> Traits:
        """A product of vectors element by element, or values times their weights; sums over an axis complete both."""
        one, other = known
        sizes = [x.numel() for x in tensors]
        if one.probabilities != other.probabilities and one.data and other.data:
            light = 0 if one.probabilities else 1
            if sizes[1 - light] > sizes[light] or sizes[1 - light] == sizes[light] == result.numel():
                return replace(union, weighted=union.weighted | known[light].probabilities)
        if one.data and other.data and result.numel() > max(sizes):
            return replace(union, scores=union.scores | {()})
        return union

    def _reduced(self, name: str, args: Any, union: Traits) -> Traits:
        if name == "sum" and union.weighted:
            self._weights(union.weighted)
            return Traits(union.data)
        if name == "sum":
            return replace(union, weighted=frozenset())
        if name in PICKS:
            return replace(union, scores=union.scores & {()}, weighted=frozenset())
        return Traits(union.data)

    def _weights(self, softmaxes: frozenset[int]) -> None:
        for number in softmaxes:
            self.seen[number].weights_values = True

    def _set(self, tensor: torch.Tensor, traits: Traits) -> None:
        self.alive.append(tensor)
        self.traits[id(tensor)] = traits


def _are_shares(weights: torch.Tensor, axis: int) -> bool:
    """True for entries that are shares of one along an axis: not negative, and no sum above one."""
    if weights.dim() < 2 or not weights.is_floating_point():
        return False
    shares = weights.nan_to_num()
    return bool((shares >= 0).all()) and bool((shares.sum(axis) <= 1 + 1e-3).all())
