"""The verification ladder: each distinct site against the original subgraph, then logits, then tokens, judged in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from subquad.application import Replacement, Rewritten, original_forward, rewritten
from subquad.capture import Capture, ProgramModule
from subquad.emission import emit_site
from subquad.graph_copy import carry_site, copy_capture
from subquad.ir.contract import Contract
from subquad.ir.errors import SubquadError
from subquad.ir.graph import attribute, dtype_of, hang, node_inputs
from subquad.ir.refusal import Refusal
from subquad.ir.report import Measurement, Report
from subquad.passes.recognize.concrete_run import PADDINGS, ConcreteRun

SIZES = ((2, 7), (3, 33))
NEW_TOKENS = 32


def verify(model: nn.Module, fast: nn.Module | None = None, example_inputs: Any = None) -> Report:
    """Measure a rewritten module against the original; returns a report whose `verification` holds the rungs.

    model: the original, or the rewritten module itself (which still knows its original).  fast: the rewritten module.
    example_inputs: tensors for the end-to-end rung; None takes those of the capture.
    Raises SubquadError when neither module was rewritten.
    """
    target = fast if fast is not None else model
    record = rewritten(target)
    if record is None:
        raise SubquadError(f"{type(target).__name__} was not rewritten, so there is nothing to verify.")
    report = record.report
    report.verification = [*site_rungs(record), logits_rung(target, record, example_inputs)]
    tokens = tokens_rung(target, record)
    if tokens is not None:
        report.verification.append(tokens)
    return report


def failed_steps(root: nn.Module) -> list[Refusal]:
    """Measure the site and logits rungs of a freshly rewritten module; a refusal per step that broke its contract."""
    record = rewritten(root)
    if record is None:
        return []
    measurements = [*site_rungs(record), logits_rung(root, record, None)]
    record.report.verification = measurements
    broken: list[Refusal] = []
    for measured in measurements:
        if measured.passed:
            continue
        paths = [measured.path] if measured.rung == "site" else [r.site.path for r in record.replacements]
        reason = f"{measured.rung} error {measured.error:.3g} exceeds the allowed {measured.allowed:.3g} ({measured.detail})."
        broken.extend(Refusal(path, "verification", reason) for path in paths)
    return broken


def relative_error(value: torch.Tensor, judge: torch.Tensor) -> float:
    """RMS of the difference over RMS of the judge; NaN where both are NaN counts as equal."""
    difference = (
        (value.double() - judge.double()).nan_to_num(nan=0.0) if _same_nan(value, judge) else torch.tensor(math.inf)
    )
    scale = judge.double().nan_to_num(nan=0.0).square().mean().sqrt()
    return float(difference.square().mean().sqrt() / scale.clamp_min(1e-300))


def _same_nan(value: torch.Tensor, judge: torch.Tensor) -> bool:
    return bool(torch.equal(value.isnan(), judge.isnan()))


def allowed_error(original: float, dtype: torch.dtype) -> float:
    """The bound of the EXACT contract: twice the original's own error plus one unit in the last place of the dtype."""
    return 2 * original + torch.finfo(dtype).eps


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
    """Run one site's own nodes and its operator on the same random q, k and v."""
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
    worst, bound, passed, cases = 0.0, 0.0, True, 0
    exact = replacement.rewrite.contract is not Contract.APPROXIMATE
    paddings = PADDINGS if site.mask.tables else ("none",)
    for batch, length in SIZES:
        for padding in paddings:
            outputs = []
            for node, double in ((moved.out, True), (moved.out, False), (next(iter(node_inputs(marker.args))), False)):
                run = ConcreteRun(copied.graph, original.example, tensors, batch, length, padding, double)
                for cut in sorted(cuts):
                    run.known[cut] = run._widen(run.random(cut).to(dtype_of(cut)))
                with torch.no_grad():
                    outputs.append(run.value(node))
            keep = _real_rows(copied, moved, original, tensors, batch, length, padding, outputs[0])
            judge, before, after = (o[keep] if keep is not None else o for o in outputs)
            error = relative_error(after, judge)
            allowed = allowed_error(relative_error(before, judge), dtype)
            cases += 1
            if exact and not error <= allowed:
                passed = False
            if error >= worst:
                worst, bound = error, allowed
    detail = f"{cases} cases, {str(dtype).removeprefix('torch.')}"
    return Measurement("site", site.path, worst, bound if exact else None, passed, detail)


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
    from subquad.emission import padding_table

    table = padding_table(site.mask)
    if table is None or padding == "none":
        return None
    run = ConcreteRun(copied.graph, original.example, tensors, batch, length, padding)
    valid = run.value(table) != 0
    axes = site.out_axes
    if valid.shape[-1] != output.shape[axes[1]]:
        return None
    view = [1] * output.dim()
    view[axes[0]], view[axes[1]] = valid.shape[0], valid.shape[1]
    ordered = valid if axes[0] < axes[1] else valid.T
    return ordered.reshape(view).expand_as(output)


def _double_output(capture: Capture, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output of the captured graph on the given inputs, every floating type widened to float64."""
    graph = capture.graph.graph
    tensors = {n: capture.known_tensors[n.name] for n in graph.nodes if n.name in capture.known_tensors}
    run = ConcreteRun(capture.graph, capture.example, tensors, 1, 1, "none", double=True)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, capture.inputs, strict=False):
        value = inputs[name]
        run.known[node] = value.double() if value.dtype.is_floating_point else value
    output = graph.output_node().args[0]
    with torch.no_grad():
        leaves = pytree.tree_map(lambda n: run.value(n) if isinstance(n, torch.fx.Node) else n, output)
    if capture.out_spec is not None:
        leaves = pytree.tree_unflatten(list(leaves), capture.out_spec)
    return _first_tensor(leaves)


def _first_tensor(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    return next(x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor))


def logits_rung(root: nn.Module, record: Rewritten, example_inputs: Any) -> Measurement:
    """End to end: the first output of the rewritten and of the original forward against a float64 run of the original."""
    capture = record.original
    inputs = dict(capture.example)
    if example_inputs is not None:
        given = (
            example_inputs
            if isinstance(example_inputs, dict)
            else dict(zip(capture.inputs, example_inputs, strict=False))
        )
        inputs.update({k: v for k, v in given.items() if isinstance(v, torch.Tensor)})
    with torch.no_grad():
        judge = _double_output(capture, inputs)
        after = _first_tensor(_call(root, capture, inputs))
        with original_forward(root):
            before = _first_tensor(_call(root, capture, inputs))
    padding = inputs.get("attention_mask")
    if padding is not None and padding.shape == judge.shape[:2]:
        keep = padding.bool()
        judge, before, after = judge[keep], before[keep], after[keep]
    error, own = relative_error(after, judge), relative_error(before, judge)
    exact = all(r.rewrite.contract is not Contract.APPROXIMATE for r in record.replacements)
    allowed = allowed_error(own, before.dtype) if exact else None
    shape = "×".join(str(s) for s in before.shape)
    return Measurement(
        "logits", "", error, allowed, allowed is None or error <= allowed, f"{shape}, original's own error {own:.2e}"
    )


def _call(root: nn.Module, capture: Capture, inputs: dict[str, torch.Tensor]) -> Any:
    constants = {k: v for k, v in capture.constants.items() if not isinstance(v, torch.Tensor)}
    if isinstance(root, torch.fx.GraphModule | ProgramModule):
        return root(*[inputs[name] for name in capture.inputs])
    return root(**inputs, **constants)


def tokens_rung(root: nn.Module, record: Rewritten) -> Measurement | None:
    """Greedy tokens of `generate` with and without the rewrite; None for a model without `generate`."""
    generate = getattr(root, "generate", None)
    ids = record.original.example.get("input_ids")
    can = getattr(root, "can_generate", None)
    if generate is None or ids is None or (can is not None and not can()):
        return None
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
    }
    with torch.no_grad():
        after = generate(ids, **options)
        with original_forward(root):
            before = generate(ids, **options)
    width = min(before.shape[1], after.shape[1])
    differing = int((before[:, :width] != after[:, :width]).any(dim=1).sum())
    exact = all(r.rewrite.contract is not Contract.APPROXIMATE for r in record.replacements)
    half = next(root.parameters()).dtype in (torch.float16, torch.bfloat16)
    passed = not exact or half or differing == 0
    detail = f"{NEW_TOKENS} greedy tokens, {before.shape[0]} rows, rows that differ"
    return Measurement("tokens", "", float(differing), 0.0 if exact and not half else None, passed, detail)
