"""Turn the masks read from a score chain into a Mask with evidence, and what stays a whole tensor into biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.mask import KV, EmptyRows, Mask, Q, print_expression
from subquad.ir.site import Bias
from subquad.ir.vocabulary import kind
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.mask_check import MaskCheck
from subquad.passes.recognize.mask_relation import conjoin
from subquad.passes.recognize.score_chain import ScoreReader
from subquad.passes.recognize.scores import MaskSource, Scores

Node = torch.fx.Node


class MaskReader:
    """Masks of the sites of one graph; what is proved once is cross-checked once."""

    def __init__(
        self, module: torch.fx.GraphModule, examples: Mapping[str, torch.Tensor], algebra: MaskAlgebra
    ) -> None:
        self.algebra = algebra
        self.check = MaskCheck(module, examples, algebra)
        self._read: dict[tuple[Any, ...], Mask] = {}

    def read(
        self, scores: Scores, empty: EmptyRows, anchor: Node, reader: ScoreReader
    ) -> tuple[Mask, tuple[Bias, ...]]:
        """The provable part of the masks as a predicate, and each mask with another part as a whole tensor.

        A mask that adds one low number is proved as a whole or not at all: where the predicate alone hid some keys and the
        tensor the others, a row without keys would be the mean over fewer values.
        """
        key = (
            *((m.predicate, m.source, m.fill) for m in scores.masks),
            *(b.node for b in scores.biases),
            empty,
            kind(anchor),
        )
        if key not in self._read:
            mask, opaque = self._split(scores, empty, anchor, reader)
            if opaque:
                return mask, opaque
            self._read[key] = mask
        return self._read[key], ()

    def _split(
        self, scores: Scores, empty: EmptyRows, anchor: Node, reader: ScoreReader
    ) -> tuple[Mask, tuple[Bias, ...]]:
        proved: list[sympy.Basic] = []
        opaque: list[Bias] = []
        for mask in scores.masks:
            parts = mask.predicate.args if isinstance(mask.predicate, sympy.And) else (mask.predicate,)
            whole = [part for part in parts if _is_whole(part) or not _is_printable(part)]
            if whole:
                opaque.append(_bias(mask, reader))
            if mask.infinite or not whole:
                proved.extend(part for part in parts if part not in whole)
        predicate = conjoin(*proved)
        words = tuple(f"opaque: {bias.node.name} is kept as a whole tensor over queries and keys" for bias in opaque)
        if predicate == sympy.true:
            return Mask(None if opaque else sympy.true, (), empty, None, words or ("no mask",)), tuple(opaque)
        names = sorted({f.func.__name__ for f in predicate.atoms(sympy.core.function.AppliedUndef)})
        tables = tuple(self.algebra.tables[name] for name in names)
        found = Mask(predicate, tables, empty)
        checked = self.check.compare(found, scores, anchor, reader, tuple(opaque))
        read = f"; it reads {', '.join(table.label for table in tables)}" if tables else ""
        evidence = (f"mask proved from its subgraph: {found.family}{read}", checked, *words)
        return Mask(predicate, tables, empty, None, evidence), tuple(opaque)


def _bias(mask: MaskSource, reader: ScoreReader) -> Bias:
    assert mask.source is not None
    tensor = reader.over_scores(mask.source, mask.met_at)
    if mask.role == "low" and not mask.infinite:
        return Bias(tensor.node, tensor.views)
    return Bias(tensor.node, tensor.views, role=mask.role, fill=mask.fill)


def _is_whole(part: sympy.Basic) -> bool:
    """True for a condition that reads a tensor over queries and keys."""
    for function in part.atoms(sympy.core.function.AppliedUndef):
        free = set().union(*(argument.free_symbols for argument in function.args))
        if Q in free and KV in free:
            return True
    return False


def _is_printable(part: sympy.Basic) -> bool:
    """True for a condition that the operators' expression language can say."""
    try:
        print_expression(part, {}, {})
    except ValueError:
        return False
    return True
