"""Each distinct rewritten site alone against the nodes it replaced, on random inputs, with float64 as the judge."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from subquad.application import Rewritten
from subquad.captured import Capture
from subquad.emission import emit_site, padding_table
from subquad.estimated_error import allowed_error, contract_errors, relative_error
from subquad.graph_copy import carry_site, copy_capture
from subquad.ir.contract import Contract
from subquad.ir.graph import attribute, dtype_of, hang, node_inputs, shape_of
from subquad.ir.report import Measurement
from subquad.passes.recognize.concrete_run import PADDINGS, ConcreteRun
from subquad.replacement import Replacement

SIZES = ((2, 7), (3, 33))
"""Batch and length of the runs; a graph that some fixed axis keeps from running at these runs at its example's own."""


def site_rungs(record: Rewritten) -> list[Measurement]:
    """One measurement per distinct replacement: sites with equal operator, sizes and mask share it."""
    known: dict[Any, Measurement] = {}
    rungs = []
    for replacement in record.replacements:
        site = replacement.site
        key = (
            replacement.call.operator, replacement.call.spec, site.heads, site.kv_heads, site.head_dim, site.value_dim,
            site.origin, len(site.biases), replacement.prefix if replacement.call.parameters else "",
        )  # fmt: skip
        if key not in known:
            known[key] = _measure_site(record.original, replacement)
        same = known[key]
        rungs.append(Measurement("site", site.path, same.error, same.allowed, same.passed, same.detail))
    return rungs


def _measure_site(original: Capture, replacement: Replacement) -> Measurement:
    """Run one site's own nodes and its operator on the same random q, k and v, at the sizes that the original runs at."""
    site = replacement.site
    copied, mapping = copy_capture(original)
    moved = carry_site(site, mapping)
    tensors = {mapping[n]: original.known_tensors[n.name] for n in mapping if n.name in original.known_tensors}
    learned = {
        n: attribute(original.root, f"{replacement.prefix}.{n}")
        for g in replacement.call.parameters.values()
        for n in g
    }
    for name, value in learned.items():
        hang(copied.graph, f"{replacement.prefix}.{name}", value)
    marker = copied.graph.graph.call_function(torch.clone, (moved.out,))
    marker.meta["val"] = moved.out.meta.get("val", moved.out.meta.get("example_value"))
    emit_site(copied.graph, moved, replacement.call, learned, replacement.prefix)
    cuts = {moved.q.node, moved.k.node, moved.v.node}
    dtype = dtype_of(site.out) or torch.float32
    exact = replacement.rewrite.contract is not Contract.APPROXIMATE
    paddings = PADDINGS if site.mask.tables else ("none",)
    new = next(iter(node_inputs(marker.args)))
    own, exact_sizes = _example_size(original), _example_sizes(original)

    def outputs(size: tuple[int, int], padding: str, draw: int) -> tuple[torch.Tensor, ...]:
        """In float64, by the original's nodes and by the operator, at real rows; nothing where the original cannot run."""
        found: list[torch.Tensor] = []
        for node, double in ((moved.out, True), (moved.out, False), (new, False)):
            run = ConcreteRun(copied.graph, original.example, tensors, *size, padding, double, draw)
            run.symbols.update(exact_sizes if size == own else {})
            for cut in sorted(cuts):
                run.known[cut] = run._widen(run.random(cut).to(dtype_of(cut)))
            with torch.no_grad():
                value = _computed(run, node, may_fail=not found)
            if value is None:
                return ()
            found.append(value)
        keep = _real_rows(copied, moved, original, tensors, *size, padding, found[0])
        return tuple(o[keep] if keep is not None else o for o in found)

    cases: list[tuple[float, float]] = []
    for size in (*SIZES, own):
        for padding in () if size == own and cases else paddings:
            first = outputs(size, padding, 0)
            if not first:
                continue
            if exact:
                error, own_error = contract_errors(first, partial(outputs, size, padding))
            else:
                error, own_error = relative_error(first[2], first[0]), 0.0
            cases.append((error, allowed_error(own_error, dtype)))
    passed = bool(cases) and (not exact or all(error <= allowed for error, allowed in cases))
    worst, bound = max(cases, key=lambda case: case[0], default=(math.inf, 0.0))
    detail = f"{len(cases)} cases, {str(dtype).removeprefix('torch.')}"
    return Measurement("site", site.path, worst, bound if exact else None, passed, detail)


def _example_size(capture: Capture) -> tuple[int, int]:
    """Batch and length of the tensors that the graph was captured with; those of SIZES where nothing tells."""
    shapes = [tensor.shape for tensor in capture.example.values() if tensor.dim() > 0]
    batch = next((shape[0] for shape in shapes), SIZES[0][0])
    return int(batch), int(next((shape[1] for shape in shapes if len(shape) > 1), SIZES[0][1]))


def _example_sizes(capture: Capture) -> dict[Any, int]:
    """The size of every symbolic axis in the example: the length of a cache and of a mask over it are not one number."""
    found: dict[Any, int] = {}
    for node in capture.graph.graph.nodes:
        example = capture.example.get(node.name) if node.op == "placeholder" else None
        for size, real in zip(shape_of(node) or (), () if example is None else example.shape, strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found[size.node.expr] = int(real)
    return found


def _computed(run: ConcreteRun, node: Any, may_fail: bool) -> Any:
    """The node's value; None where the original's own nodes cannot run at this size (a buffer of fixed length, a view)."""
    try:
        return run.value(node)
    except (RuntimeError, IndexError, ValueError):
        if not may_fail:
            raise
        return None


def _real_rows(
    copied: Capture,
    site: Any,
    original: Capture,
    tensors: Any,
    batch: int,
    length: int,
    padding: str,
    output: torch.Tensor,
) -> torch.Tensor | None:
    """For rewrites that drop padded queries: a mask over the output's [B, H, T, …] that keeps real positions."""
    table = padding_table(site.mask)
    if table is None or padding == "none":
        return None
    run = ConcreteRun(copied.graph, original.example, tensors, batch, length, padding)
    valid = run.value(table) != 0
    if site.packed or any(len(group) != 1 for group in site.out_axes[:2]):
        return None
    (batch_axis,), (time_axis,) = site.out_axes[:2]
    if valid.shape[-1] != output.shape[time_axis]:
        return None
    view = [1] * output.dim()
    view[batch_axis], view[time_axis] = valid.shape[0], valid.shape[1]
    ordered = valid if batch_axis < time_axis else valid.T
    return ordered.reshape(view).expand_as(output)
