"""Find every softmax attention of a graph: two anchors, one interpreter, a site or a refusal for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of, module_path, rank_of, shape_of, source_of, users_of
from subquad.ir.mask import KV, B, EmptyRows, H, Mask, Q
from subquad.ir.refusal import Refusal
from subquad.ir.site import Bias, CanonicalAxes, Site
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize import mask_views  # noqa: F401  (registers the view rules)
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.mask_check import MaskCheck
from subquad.passes.recognize.operands import Peeled, peel
from subquad.passes.recognize.product import DIM, TIME, Product, read_product
from subquad.passes.recognize.score_chain import PROJECTION, NotAttention, Scores, canonical, is_weight, read_scores
from subquad.passes.recognize.symbolic_tensor import as_condition, is_boolean, visible

Node = torch.fx.Node


def find_attention(
    module: torch.fx.GraphModule,
    tensors: Mapping[Node, torch.Tensor] | None = None,
    examples: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Site], list[Refusal]]:
    """Every attention site of the graph in graph order, and a refusal for each softmax or SDPA call that is none.

    module: a captured graph with recorded values.  tensors: placeholders whose content is known and fixed (parameters and
    buffers that Dynamo lifted to inputs).  examples: input tensors by name, for the concrete cross-check of masks.
    """
    finder = _Finder(module, tensors, examples or {})
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for node in list(module.graph.nodes):
        anchor = {"sdpa": finder.from_sdpa, "softmax": finder.from_softmax, "softmax_core": finder.from_softmax}.get(
            kind(node)
        )
        if anchor is None:
            continue
        try:
            sites.append(anchor(node))
        except NotAttention as no:
            what = "attention" if kind(node) == "sdpa" else "softmax"
            refusals.append(Refusal(module_path(node), what, no.reason + ".", source_of(no.node) or source_of(node)))
    return _numbered(sites), refusals


def _numbered(sites: list[Site]) -> list[Site]:
    """Distinct paths: the second and later sites of one module get #1, #2, … behind its path."""
    seen: dict[str, int] = {}
    result = []
    for site in sites:
        count = seen.get(site.path, 0)
        seen[site.path] = count + 1
        result.append(replace(site, path=f"{site.path}#{count}") if count else site)
    return result


class _Finder:
    def __init__(
        self,
        module: torch.fx.GraphModule,
        tensors: Mapping[Node, torch.Tensor] | None,
        examples: Mapping[str, torch.Tensor],
    ) -> None:
        self.algebra = MaskAlgebra(module, tensors)
        self.check = MaskCheck(module, examples, self.algebra)

    def from_sdpa(self, node: Node) -> Site:
        a = arguments(node)
        q, k, v = a["q"], a["k"], a["v"]
        rank = rank_of(q) or 0
        if rank not in (3, 4):
            raise NotAttention(f"scaled_dot_product_attention of {rank} axes; three or four are understood", node)
        if isinstance(a["dropout"], (int, float)) and a["dropout"] > 0:
            raise NotAttention("attention dropout is active, which no rewrite can keep exact; call eval()", node)
        axes = (B, H, TIME, DIM) if rank == 4 else (B, TIME, DIM)
        heads = self._heads(q, rank, node)
        grouped = heads // self._heads(k, rank, node) if a["enable_gqa"] else 1
        q_read = peel(q, axes, heads, self.algebra)
        k_read = _peel_grouped(k, axes, heads, grouped, self.algebra)
        v_read = _peel_grouped(v, axes, heads, grouped, None)
        head_dim = self._static(shape_of(q), -1, node)
        scale = float(a["scale"]) if a["scale"] is not None else 1 / math.sqrt(head_dim)
        scale *= q_read.factor * k_read.factor
        words = [f"scaled_dot_product_attention, scale {scale:g}"]
        predicate: sympy.Basic = sympy.true
        biases: tuple[Bias, ...] = ()
        empty: EmptyRows = "zero"
        sources: tuple[Node, ...] = ()
        if a["is_causal"]:
            predicate = sympy.Le(KV, Q)
            words.append("is_causal")
        if a["mask"] is not None:
            sources = (a["mask"],)
            predicate, biases, empty = self._sdpa_mask(a["mask"], node, q, k)
        scores = Scores(node, scale, None, biases, predicate, empty != "mean", (node,), tuple(words), sources)
        return self._site(node, "sdpa", node, q_read, k_read, v_read, heads, scores, empty, rank)

    def _sdpa_mask(self, mask: Node, node: Node, q: Node, k: Node) -> tuple[sympy.Basic, tuple[Bias, ...], EmptyRows]:
        rank = rank_of(node) or 0
        out = shape_of(node) or ()
        shape = (*out[:-1], (shape_of(k) or ())[-2])
        self.algebra.formula(mask)
        element = self.algebra.element(mask, shape)
        if dtype_of(mask) == torch.bool or is_boolean(element):
            return canonical(as_condition(element), rank), (), "zero"
        read = visible(element)
        if read is None:
            return sympy.true, (Bias(mask),), "zero"
        return canonical(read[0], rank), (), "zero" if read[1] else "mean"

    def from_softmax(self, node: Node) -> Site:
        a = arguments(node)
        rank = rank_of(node) or 0
        if a["dim"] not in (-1, rank - 1):
            raise NotAttention(f"the softmax runs over axis {a['dim']} of {rank}, not over keys on the last axis", node)
        scores = read_scores(a["x"], self.algebra)
        if rank not in (3, 4) or rank_of(scores.product) != rank:
            raise NotAttention(f"the scores have {rank} axes; three or four are understood", node)
        product = read_product(scores.product)
        if product is None:
            raise NotAttention("the scores come from a product that does not pair queries with keys", scores.product)
        if is_weight(product.left) or is_weight(product.right):
            raise NotAttention(PROJECTION, node)
        output, weighted, passed = self._weighted_values(node)
        heads = self._heads(scores.product, rank, node)
        q_read = peel(product.left, product.axes_of_left, heads, self.algebra)
        k_read = peel(product.right, product.axes_of_right, heads, self.algebra)
        v_read = peel(weighted.right, weighted.values_axes, heads, None)
        scale = scores.scale * q_read.factor * k_read.factor
        scores = Scores(
            scores.product, scale, scores.softcap, scores.biases, scores.predicate, scores.infinite,
            (*scores.passed, node, *passed), (*scores.words, "softmax"), scores.mask_nodes,
        )  # fmt: skip
        empty: EmptyRows = "zero" if scores.predicate == sympy.true else "nan" if scores.infinite else "mean"
        return self._site(
            node, "softmax", output, q_read, k_read, v_read, heads, scores, empty, rank, weighted.output_axes(rank)
        )

    def _weighted_values(self, softmax: Node) -> tuple[Node, Product, list[Node]]:
        here, passed = softmax, list[Node]()
        while True:
            users = users_of(here)
            if len(users) != 1:
                raise NotAttention(
                    "the attention probabilities have other uses than weighting values (output_attentions?)"
                    if users
                    else "the attention probabilities are returned or unused",
                    here,
                )
            user = users[0]
            name = kind(user)
            product = read_product(user)
            if product is not None and product.left is here and product.weights_values:
                return user, product, passed
            if name == "dropout":
                a = arguments(user)
                if a["p"] > 0 and a["train"]:
                    raise NotAttention(
                        "attention dropout is active, which no rewrite can keep exact; call eval()", user
                    )
            elif name not in ("cast", "contiguous"):
                raise NotAttention(
                    f"the softmax does not weight values: it is followed by `{name or user.target}`, not by a product with V",
                    user,
                )
            passed.append(user)
            here = user

    def _heads(self, node: Node, rank: int, anchor: Node) -> int:
        return 1 if rank == 3 else self._static(shape_of(node), 1, anchor)

    def _static(self, shape: tuple[Any, ...] | None, place: int, node: Node) -> int:
        if shape is None or not isinstance(shape[place], int):
            raise NotAttention("the number of heads or the head size is not a fixed number", node)
        return int(shape[place])

    def _site(
        self, anchor: Node, origin: str, out: Node, q: Peeled, k: Peeled, v: Peeled, heads: int, scores: Scores,
        empty: EmptyRows, rank: int, out_axes: CanonicalAxes | None = None,
    ) -> Site:  # fmt: skip
        if k.repeats != v.repeats:
            raise NotAttention("keys and values repeat their heads differently", anchor)
        mask, opaque = self._mask(scores, empty, anchor)
        biases = scores.biases + opaque
        out_axes = out_axes or ((0, 2, 1, 3) if rank == 4 else (0, 1, None, 2))
        words = " → ".join(scores.words)
        evidence = [f"read from the graph: {words}"]
        if k.repeats > 1:
            evidence.append(f"each key/value head serves {k.repeats} query heads (repetition peeled off)")
        q_shape, k_shape = shape_of(q.operand.node) or (), shape_of(k.operand.node) or ()
        q_time, k_time = q_shape[q.operand.axes[1] or 0], k_shape[k.operand.axes[1] or 0]
        phase = "full" if str(q_time) == str(k_time) else "cross"
        absorbed = tuple(dict.fromkeys((*scores.passed, *k.passed, *v.passed, *q.passed)))
        return Site(
            path=module_path(out), origin=origin, phase=phase, q=q.operand, k=k.operand, v=v.operand, out=out,
            out_axes=out_axes, scale=scores.scale, mask=mask, heads=heads, kv_heads=heads // k.repeats,
            head_dim=self._static(q_shape, q.operand.axes[3] or 0, anchor),
            value_dim=self._static(shape_of(v.operand.node), v.operand.axes[3] or 0, anchor),
            softcap=scores.softcap, biases=biases, folded=q.factor * k.factor,
            absorbed=absorbed, evidence=tuple(evidence), source=source_of(anchor),
        )  # fmt: skip

    def _mask(self, scores: Scores, empty: EmptyRows, anchor: Node) -> tuple[Mask, tuple[Bias, ...]]:
        """The provable part of the mask as a predicate, and each whole-tensor part as a boolean that keeps or hides."""
        proved: list[sympy.Basic] = []
        opaque: list[Bias] = []
        parts = scores.predicate.args if isinstance(scores.predicate, sympy.And) else (scores.predicate,)
        for part in parts:
            dense = self._dense_tables(part)
            if not dense:
                proved.append(part)
                continue
            table = self.algebra.tables[dense[0]]
            if len(dense) > 1 or not isinstance(part, (sympy.Ne, sympy.Eq)) or part.args[1] != 0:
                raise NotAttention(
                    f"the mask reads {', '.join(dense)}, a tensor over queries and keys, in a way that is not understood",
                    anchor,
                )
            opaque.append(Bias(table.node, role="keep" if isinstance(part, sympy.Ne) else "hide"))
        predicate = sympy.And(*proved)
        words = tuple(f"opaque: {bias.node.name} is given as a whole tensor over queries and keys" for bias in opaque)
        if predicate == sympy.true:
            return Mask(None if opaque else sympy.true, (), empty, None, words or ("no mask",)), tuple(opaque)
        names = sorted({f.func.__name__ for f in predicate.atoms(sympy.core.function.AppliedUndef)})
        mask = Mask(predicate, tuple(self.algebra.tables[name] for name in names), empty)
        checked = (
            "not cross-checked: it acts beside an opaque mask" if opaque else self.check.compare(mask, scores, anchor)
        )
        evidence = (f"mask proved from its subgraph: {mask.family}", checked, *words)
        return Mask(predicate, mask.tables, empty, None, evidence), tuple(opaque)

    def _dense_tables(self, part: sympy.Basic) -> list[str]:
        found = set()
        for function in part.atoms(sympy.core.function.AppliedUndef):
            free = set().union(*(argument.free_symbols for argument in function.args))
            if Q in free and KV in free:
                found.add(function.func.__name__)
        return sorted(found)


def _peel_grouped(
    node: Node, axes: tuple[sympy.Symbol, ...], heads: int, grouped: int, algebra: MaskAlgebra | None
) -> Peeled:
    """The operand of an SDPA call, which itself repeats every key/value head `grouped` times."""
    read = peel(node, axes, heads // grouped, algebra)
    return replace(read, repeats=read.repeats * grouped)
