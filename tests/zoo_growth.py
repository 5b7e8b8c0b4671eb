"""Time of recognition and of applying `fuse`, beside capture: on a real model, and on graphs of growing length."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import subquad
from subquad.capture import capture
from subquad.ir.report import Report
from subquad.pass_spec import parse_passes
from subquad.pipeline import carry_out, choose
from subquad.recognition import recognise


class Stack(nn.Module):
    """`layers` causal attentions one after another, eight operations each."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, hidden)
        return x


class Layer(nn.Module):
    """One head of causal attention of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).split(4, dim=-1)
        scores = (q @ k.transpose(1, 2)) * 0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return x + weights @ v


def measure(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Seconds of capture, recognition and apply, the number of nodes and of sites."""
    start = time.perf_counter()
    captured = capture(model, inputs)
    caught = time.perf_counter()
    report = recognise(captured, Report())
    seen = time.perf_counter()
    nodes = len(captured.graph.graph.nodes)
    steps = choose(parse_passes("fuse"), report.sites, report)
    planned = time.perf_counter()
    carry_out(captured, report, steps, verify=False)
    done = time.perf_counter()
    return {
        "capture": caught - start, "recognise": seen - caught, "apply": done - planned,
        "nodes": nodes, "sites": len(report.sites),
    }  # fmt: skip


def print_tables(sizes: tuple[int, ...] = (10, 30, 100, 300, 1000)) -> None:
    """The packaged 30-layer model in both spellings, then stacks of tiny layers."""
    from transformers import AutoModelForCausalLM

    head = "| model | nodes | sites | capture s | recognition s | apply s | recognition + apply over capture | per node µs |"
    print(head + "\n|---|---|---|---|---|---|---|---|")
    for spelling in ("sdpa", "eager"):
        directory = subquad.demo_weights()
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=spelling
        ).eval()
        _print_row(f"SmolLM2-135M, {spelling}", measure(model, None))
    for layers in sizes:
        _print_row(f"stack of {layers}", measure(Stack(layers).eval(), (torch.randn(2, 9, 4),)))


def _print_row(name: str, m: dict[str, float]) -> None:
    ours = m["recognise"] + m["apply"]
    print(
        f"| {name} | {m['nodes']:.0f} | {m['sites']:.0f} | {m['capture']:.2f} | {m['recognise']:.2f} | {m['apply']:.2f} "
        f"| {100 * ours / m['capture']:.0f} % | {1e6 * ours / m['nodes']:.0f} |",
        flush=True,
    )
