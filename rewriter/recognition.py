"""Run every recogniser on a capture."""

from __future__ import annotations

import time

from subquad.capture import Capture
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report
from subquad.passes.recognize.attention import find_attention
from subquad.passes.recognize.near_miss import nearest_miss


def recognise(capture: Capture, report: Report) -> Report:
    """Add the capture's sites and refusals to the report, with the time it took."""
    start = time.perf_counter()
    tensors = {
        node: capture.known_tensors[node.name]
        for node in capture.graph.graph.nodes
        if node.name in capture.known_tensors
    }
    sites, refusals = find_attention(capture.graph, tensors, capture.example)
    report.notes.extend(note for note in capture.notes if note not in report.notes)
    report.sites.extend(sites)
    report.refusals.extend(refusals)
    if not sites:
        report.nearest = nearest_miss(capture.graph.graph, report.refusals)
    if not sites and not refusals:
        report.refusals.append(
            Refusal(
                "",
                "attention",
                "the graph holds no softmax and no scaled_dot_product_attention, so there is no attention.",
            )
        )
    report.seconds["recognise"] = time.perf_counter() - start
    return report
