"""The verification ladder: each distinct site against the original subgraph, then logits, then tokens, judged in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from subquad.application import Rewritten, original_forward, rewritten
from subquad.bound_forward import own_hooks_lifted
from subquad.captured import Capture
from subquad.estimated_error import allowed_error, contract_errors, relative_error
from subquad.graph_copy import copy_capture
from subquad.ir.contract import Contract
from subquad.ir.errors import SubquadError
from subquad.ir.graph import attribute, hang
from subquad.ir.refusal import Refusal
from subquad.ir.report import Measurement, Report
from subquad.passes.recognize.concrete_run import ConcreteRun
from subquad.redrawn_inputs import redrawn
from subquad.site_oracle import site_rungs

NEW_TOKENS = 32


def verify(model: nn.Module, fast: nn.Module | None = None, example_inputs: Any = None) -> Report:
    """Measure a rewritten module against the original; returns a report whose `verification` holds the rungs.

    model: the original, or the rewritten module itself, whose own weights under the original forward are then the
    original.  fast: the rewritten module; a converted one has other weights than `model`, and is measured against those.
    example_inputs: tensors for the end-to-end rungs; None takes those of the capture.
    Raises SubquadError when neither module was rewritten.
    """
    target = fast if fast is not None else model
    record = rewritten(target)
    if record is None:
        raise SubquadError(f"{type(target).__name__} was not rewritten, so there is nothing to verify.")
    original = None if model is target else model
    report = record.report
    report.verification = [*site_rungs(record), *end_to_end_rungs(target, record, example_inputs, original)]
    tokens = tokens_rung(target, record, original)
    if tokens is not None:
        report.verification.append(tokens)
    return report


def failed_steps(root: nn.Module) -> list[Refusal]:
    """Measure the site and logits rungs of a freshly rewritten module; a refusal per step that broke its contract."""
    record = rewritten(root)
    if record is None:
        return []
    measurements = [*site_rungs(record), *end_to_end_rungs(root, record)]
    record.report.verification = measurements
    broken: list[Refusal] = []
    for measured in measurements:
        if measured.passed:
            continue
        paths = [measured.path] if measured.rung == "site" else [r.site.path for r in record.replacements]
        reason = f"{measured.rung} error {measured.error:.3g} exceeds the allowed {measured.allowed:.3g} ({measured.detail})."
        broken.extend(Refusal(path, "verification", reason) for path in paths)
    return broken


@contextmanager
def _as_original(root: nn.Module, original: nn.Module | None) -> Iterator[nn.Module]:
    """The module to call for the original's outputs: another module, or the rewritten one under its own forward."""
    if original is not None:
        yield original
    else:
        with original_forward(root):
            yield root


def _original_capture(record: Rewritten, original: nn.Module | None) -> Capture:
    """The captured original on the weights it is judged with."""
    if original is None:
        return record.original
    capture, _ = copy_capture(record.original)
    for name, _ in [*capture.graph.named_parameters(), *capture.graph.named_buffers()]:
        if hasattr(original, name.split(".")[0]):
            hang(capture.graph, name, attribute(original, name))
    return capture


def graph_output(capture: Capture, inputs: dict[str, torch.Tensor], double: bool = True) -> torch.Tensor:
    """The first output of the captured graph, computed from what it depends on; double: in float64 throughout."""
    graph = capture.graph.graph
    tensors = {n: capture.known_tensors[n.name] for n in graph.nodes if n.name in capture.known_tensors}
    run = ConcreteRun(capture.graph, capture.example, tensors, 1, 1, "none", double=double)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, capture.inputs, strict=False):
        value = inputs[name]
        run.known[node] = value.double() if double and value.dtype.is_floating_point else value.clone()
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


def end_to_end_rungs(
    root: nn.Module, record: Rewritten, example_inputs: Any = None, original: nn.Module | None = None
) -> list[Measurement]:
    """The first output of the rewritten and of the original forward against a float64 run of the original.

    The graph that was captured is the judge, so that first it must itself give what the original forward gives.
    Where few rows of that output make up its error, and it is above the bound, more inputs of the same kind decide.
    Rewrites that are another function also get the mean KL divergence, in nats per position, when the output is logits.
    """
    capture = _original_capture(record, original)
    inputs = dict(capture.example)
    if example_inputs is not None:
        named = isinstance(example_inputs, dict)
        given = example_inputs if named else dict(zip(capture.inputs, example_inputs, strict=False))
        inputs.update({k: v for k, v in given.items() if k in capture.inputs and isinstance(v, torch.Tensor)})

    def outputs(given: dict[str, torch.Tensor], replay: bool = False) -> list[torch.Tensor]:
        """The judge's output, the original's, the rewritten one, and on request the graph's, at real positions."""
        with torch.no_grad():
            found = [graph_output(capture, given, double=True)]
            with _as_original(root, original) as module:
                found.append(_first_tensor(_call(module, capture, given)))
            found.append(_first_tensor(_call(root, record.original, given)))
            if replay:
                found.append(graph_output(capture, given, double=False))
        padding = given.get("attention_mask")
        real = padding is not None and padding.shape == found[0].shape[:2]
        return [x[padding.bool()] for x in found] if padding is not None and real else found

    judge, before, after, replayed = outputs(inputs, replay=True)
    faithful = _faithful(replayed, before)
    exact = _is_exact(record)
    if exact:
        error, own = contract_errors((judge, before, after), lambda draw: outputs(redrawn(inputs, draw)))
    else:
        error, own = relative_error(after, judge), relative_error(before, judge)
    allowed = allowed_error(own, before.dtype) if exact else None
    shape = "×".join(str(s) for s in before.shape)
    detail = f"{shape}, original's own error {own:.2e}"
    rungs = [Measurement("logits", "", error, allowed, allowed is None or error <= allowed, detail), faithful]
    if not exact and judge.dim() >= 2 and judge.shape[-1] > 1:
        expected, found = (x.double().log_softmax(-1) for x in (judge, after))
        divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
        rungs.append(Measurement("kl", "", divergence, None, True, f"{shape}, mean KL to the original, nats"))
    return rungs


def _faithful(replayed: torch.Tensor, before: torch.Tensor) -> Measurement:
    """The captured graph in its own precision against the original forward: a graph that lost something is no judge."""
    error, allowed = relative_error(replayed, before), torch.finfo(before.dtype).eps ** 0.5
    return Measurement("capture", "", error, allowed, error <= allowed, "captured graph against the original forward")


def _is_exact(record: Rewritten) -> bool:
    return all(r.rewrite.contract is not Contract.APPROXIMATE for r in record.replacements)


def _call(root: nn.Module, capture: Capture, inputs: dict[str, torch.Tensor]) -> Any:
    """The outputs of one forward, which leaves the inputs and the root's buffers as they are; hooks of the root do not run."""
    with capture.state_kept(), own_hooks_lifted(root):
        return capture.call(root, {name: value.clone() for name, value in inputs.items()})


def tokens_rung(root: nn.Module, record: Rewritten, original: nn.Module | None = None) -> Measurement | None:
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
        with _as_original(root, original) as module:
            before = module.generate(ids, **options)  # type: ignore[operator]
    width = min(before.shape[1], after.shape[1])
    differing = int((before[:, :width] != after[:, :width]).any(dim=1).sum())
    exact = _is_exact(record)
    half = next(root.parameters()).dtype in (torch.float16, torch.bfloat16)
    passed = not exact or half or differing == 0
    detail = f"{NEW_TOKENS} greedy tokens, {before.shape[0]} rows, rows that differ"
    return Measurement("tokens", "", float(differing), 0.0 if exact and not half else None, passed, detail)
