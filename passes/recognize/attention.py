"""Find every softmax attention of a graph: anchors, one interpreter, a site or a refusal for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of, module_path, rank_of, shape_of, source_of
from subquad.ir.mask import EmptyRows, FloorDiv
from subquad.ir.refusal import Refusal, refuse
from subquad.ir.site import Bias, CanonicalAxes, Operand, Site
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.canonicalize.flex_attention import is_flex, why_kept
from subquad.passes.recognize import mask_views  # noqa: F401  (registers the view rules)
from subquad.passes.recognize.chain import Chain, read_chain
from subquad.passes.recognize.empty_rows import empty_rows, unambiguous
from subquad.passes.recognize.frame import DIM, Frame, digit, digits
from subquad.passes.recognize.loose_ends import loose_ends
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.mask_reading import MaskReader
from subquad.passes.recognize.normalisation import Normalised, read_softmax
from subquad.passes.recognize.operands import Peeled, alike, peel, size_of_axes
from subquad.passes.recognize.output_side import read_output
from subquad.passes.recognize.product import Product
from subquad.passes.recognize.provenance import ProvenanceReader
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_chain import ScoreReader, drops_out, read_scores
from subquad.passes.recognize.score_fills import hidden_exponentials
from subquad.passes.recognize.score_frame import constant_of
from subquad.passes.recognize.score_path import PROJECTION, is_weight, paths_to_products
from subquad.passes.recognize.score_sinks import beside
from subquad.passes.recognize.scores import LOW, MaskSource, Scores
from subquad.passes.recognize.symbolic_tensor import as_condition, is_boolean, is_one, visible
from subquad.passes.recognize.weighting import read_weighting

Node = torch.fx.Node
DROPOUT = "attention dropout is active, which no rewrite can keep exact; call eval()"


def find_attention(
    module: torch.fx.GraphModule,
    tensors: Mapping[Node, torch.Tensor] | None = None,
    examples: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Site], list[Refusal]]:
    """Every attention site of the graph in graph order, and a refusal for each softmax or SDPA call, or loose end, that is none.

    module: a captured graph with recorded values.  tensors: placeholders whose content is known and fixed (parameters and
    buffers that Dynamo lifted to inputs).  examples: input tensors by name, for the concrete cross-check of masks.
    """
    finder = _Finder(module, tensors, examples or {})
    provenance = ProvenanceReader(module, finder.algebra, tensors)
    sites: list[Site] = []
    refusals: list[Refusal] = []
    refused: list[Node] = []
    for node in list(module.graph.nodes):
        what = "attention" if kind(node) == "sdpa" or is_flex(node) else "softmax"
        try:
            site = finder.site(node)
        except NotAttention as no:
            named = "projection" if no.reason == PROJECTION else no.kind
            refusals.append(refuse(node, what, no.reason, named, no.node))
            refused.append(node)
            continue
        if site is not None:
            behind = provenance.read(site.q, site.k, site.v)
            if site.out_axes[3] == (len(shape_of(site.out) or ()) - 1,) and not site.packed:
                behind = replace(behind, output=read_output(site.out, site.value_dim, provenance.held))
            sites.append(replace(site, provenance=behind))
    return _numbered(sites), [*refusals, *loose_ends(module.graph, sites, refused)]


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
        self.module = module
        self.algebra = MaskAlgebra(module, tensors)
        self.masks = MaskReader(module, examples, self.algebra)

    def site(self, node: Node) -> Site | None:
        """The site a node is the anchor of; None when it is no anchor."""
        if is_flex(node):
            raise NotAttention(why_kept(self.module, node), node, "flex")
        if kind(node) == "sdpa":
            return self._from_sdpa(node)
        found = read_softmax(node)
        return None if found is None else self._from_softmax(found)

    def _from_sdpa(self, node: Node) -> Site:
        a = arguments(node)
        q, k, v = a["q"], a["k"], a["v"]
        if drops_out({"p": a["dropout"], "train": True}):
            raise NotAttention(DROPOUT, node, "dropout")
        frame, product = _sdpa_frame(node, q, k, v, a["enable_gqa"])
        place = digits(frame.shape)
        out = (*(place[n] for n in range(len(place) - 2)), place[-2], DIM)
        reader = ScoreReader(frame, {node: place}, self.algebra, {node: frame.shape})
        q_read = peel(q, _broadcast(q, (*place[:-1], DIM)), frame, frame.query, self.algebra)[-1]
        keys = _grouped((*place[:-2], place[-1], DIM), k, frame, a["enable_gqa"])
        k_read, v_read = alike(
            peel(k, _broadcast(k, keys), frame, frame.key, self.algebra),
            peel(v, _broadcast(v, keys), frame.with_keys((shape_of(v) or ())[-2]), frame.key, None),
            node,
        )
        head_dim = self._static(size_of_axes(q_read.operand, 3), node)
        scale = 1 / math.sqrt(head_dim) if a["scale"] is None else constant_of(a["scale"], self.algebra)
        if scale is None:
            raise NotAttention("the scale of scaled_dot_product_attention is not one fixed number", node, "scale")
        words = [f"scaled_dot_product_attention, scale {scale:g}"]
        scores = Scores(node, scale, passed=(node,), words=tuple(words))
        empty: EmptyRows = "zero"
        if a["is_causal"]:
            causal = sympy.Le(place[-1], place[-2])
            triangle = MaskSource(frame.canonical(causal), None, node, "keep")
            scores = replace(scores, masks=(triangle,), words=(*scores.words, "is_causal"))
        if a["mask"] is not None:
            scores, empty = self._sdpa_mask(scores, a["mask"], node, reader)
        read = frame.axes(shape_of(node) or (), out, frame.query, (shape_of(node) or (1,))[-1])
        if read is None:
            raise NotAttention("the axes of the result are not batch, head, time and dim", node, "layout")
        return self._site(node, "sdpa", node, read.axes, q_read, k_read, v_read, reader, scores, empty)

    def _sdpa_mask(self, scores: Scores, mask: Node, node: Node, reader: ScoreReader) -> tuple[Scores, EmptyRows]:
        element = reader.element(mask, node)
        if dtype_of(mask) == torch.bool or is_boolean(element):
            seen, fill, role = as_condition(element), float("-inf"), "keep"
        else:
            read = visible(element)
            if read is None:
                if (parts := reader.in_parts(scores, node, mask)) is not None:
                    return parts, "zero" if parts.infinite else "mean"
                tensor = reader.over_scores(mask, node)
                return replace(scores, biases=(Bias(tensor.node, tensor.views),)), "zero"
            seen, fill, role = read[0], float("-inf") if read[1] else LOW, "low"
        source = MaskSource(reader.in_frame(seen, node), mask, node, role, fill)
        return replace(scores, masks=(*scores.masks, source)), "zero" if source.infinite else "mean"

    def _from_softmax(self, found: Normalised) -> Site:
        """The site of the first product above the softmax that makes it one; the first one's reason where none does."""
        first: NotAttention | None = None
        for nodes in paths_to_products(found.x):
            try:
                return self._from_chain(found, read_chain(nodes, found.dim))
            except NotAttention as no:
                first = first or no
        assert first is not None
        raise first

    def _from_chain(self, found: Normalised, chain: Chain) -> Site:
        reader = ScoreReader(chain.frame, chain.places, self.algebra)
        scores = read_scores(chain, self.algebra)
        product, frame = chain.product, chain.frame
        if is_weight(product.left) or is_weight(product.right):
            raise NotAttention(PROJECTION, found.node, "projection")
        if found.base != math.e:
            scores = reader.times(scores, found.node, math.log(found.base), "base")
        if found.extra_logit is not None:
            scores = beside(reader, scores, found.extra_logit, found.node, chain.nodes[-1])
        for node in found.masked:
            scores = hidden_exponentials(reader, scores, node, chain.places[chain.nodes[-1]])
        weighting = read_weighting(found, chain, scores, reader)
        out = chain.places[chain.nodes[0]]
        left = product.indices(product.left, product.left_labels, out, DIM)
        right = product.indices(product.right, product.right_labels, out, DIM)
        q_read = peel(product.left, left, frame, frame.query, self.algebra)[-1]
        k_read, v_read = alike(
            peel(product.right, right, frame, frame.key, self.algebra),
            peel(weighting.values, weighting.indices, frame, frame.key, None),
            found.node,
        )
        passed = (*scores.passed, *found.passed, *weighting.passed)
        scores = replace(scores, passed=passed, words=(*scores.words, found.word))
        if weighting.empty_rows is None:
            scores = unambiguous(scores, reader)
        empty = empty_rows(scores, weighting.empty_rows, found.safe)
        site = self._site(
            found.node, "softmax", weighting.out, weighting.out_axes, q_read, k_read, v_read, reader, scores, empty
        )
        return replace(site, packed=weighting.packed)

    def _static(self, size: Any, node: Node) -> int:
        if not isinstance(size, int):
            raise NotAttention("the number of heads or the head size is not a fixed number", node, "sizes")
        return size

    def _site(
        self, anchor: Node, origin: str, out: Node, out_axes: CanonicalAxes, q: Peeled, k: Peeled, v: Peeled,
        reader: ScoreReader, scores: Scores, empty: EmptyRows,
    ) -> Site:  # fmt: skip
        heads = int(reader.frame.head_count())
        mask, opaque = self.masks.read(scores, empty, anchor, reader)
        evidence = [f"read from the graph: {' → '.join(scores.words)}"]
        kv_heads = heads // k.repeats
        if k.repeats > 1:
            evidence.append(f"each key/value head serves {k.repeats} query heads (repetition peeled off)")
        q_time, k_time = size_of_axes(q.operand, 1), size_of_axes(k.operand, 1)
        return Site(
            path=module_path(out), origin=origin, phase=_phase(q_time, k_time),
            q=q.operand, k=k.operand, v=v.operand, out=out, out_axes=out_axes,
            scale=scores.scale * q.factor * k.factor, mask=mask, heads=heads, kv_heads=kv_heads,
            head_dim=self._static(size_of_axes(q.operand, 3), anchor),
            value_dim=self._static(_value_dim(q.operand, k.operand, v.operand, out, out_axes), anchor),
            softcap=scores.softcap, biases=scores.biases + opaque, gain=scores.gain, sinks=scores.sinks,
            folded=q.factor * k.factor,
            absorbed=tuple(dict.fromkeys((*scores.passed, *k.passed, *v.passed, *q.passed))),
            mask_sources=tuple(mask.source for mask in scores.masks if mask.source is not None),
            evidence=tuple(evidence), source=source_of(anchor),
        )  # fmt: skip


def _value_dim(q: Operand, k: Operand, v: Operand, out: Node, out_axes: CanonicalAxes) -> Any:
    """The width of the values.

    Where the capture has only a quotient of sizes for it: that of the result, or that of the queries, which the product
    proves to be the keys', where keys and values have the same quotient.
    """
    size, place = size_of_axes(v, 3), out_axes[3]
    if not isinstance(size, int) and str(size) == str(size_of_axes(k, 3)):
        size = size_of_axes(q, 3)
    return (shape_of(out) or ())[place[0]] if not isinstance(size, int) and len(place) == 1 else size


def _phase(q_time: Any, k_time: Any) -> str:
    if str(q_time) == str(k_time):
        return "full"
    return "decode" if is_one(q_time) else "cross"


def _sdpa_frame(node: Node, q: Node, k: Node, v: Node, grouped: bool) -> tuple[Frame, Product]:
    rank = rank_of(node) or 0
    ranks = {rank_of(x) for x in (q, k, v)}
    if rank < 2 or None in ranks or max(r or 0 for r in ranks) > rank:
        raise NotAttention("scaled_dot_product_attention of operands without recorded sizes", node, "sizes")
    out, keys = shape_of(node) or (), shape_of(k) or ()
    shape = (*out[:-1], keys[-2])
    rest = tuple(range(rank - 2))
    has_heads = rank >= 4 and isinstance(shape[rank - 3], int)
    if grouped and not has_heads:
        raise NotAttention("enable_gqa without a fixed number of heads", node, "heads")
    batch, heads = (rest[:-1], rest[-1:]) if has_heads else (rest, ())
    letters = "abcdefgh"[: rank - 2]
    product = Product(q, k, letters + "mk", letters + "nk", letters + "mn")
    return Frame(shape, batch, heads, rank - 2, rank - 1), product


def _broadcast(node: Node, place: tuple[sympy.Basic, ...]) -> tuple[sympy.Basic, ...]:
    shape = shape_of(node) or ()
    aligned = place[len(place) - len(shape) :]
    return tuple(
        sympy.S.Zero if isinstance(size, int) and size == 1 else index
        for size, index in zip(shape, aligned, strict=True)
    )


def _grouped(place: tuple[sympy.Basic, ...], k: Node, frame: Frame, grouped: bool) -> tuple[sympy.Basic, ...]:
    """The indices of keys whose heads an SDPA call with enable_gqa repeats."""
    if not grouped:
        return place
    head = frame.heads[-1]
    held = (shape_of(k) or ())[-3]
    repeats = frame.sizes[digit(head)] / held
    return tuple(FloorDiv(index, repeats) if n == head else index for n, index in enumerate(place))
