"""The head of logits of a decoder: what it reads behind every token, and its weight; drafters go on from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch import Tensor

from subquad.ir.graph import ancestors
from subquad.runtime.schedule import Program, Runner, Schedule

PRODUCTS = {torch.ops.aten.linear.default, torch.ops.subquad.narrow_linear.default}


@dataclass(frozen=True)
class Readout:
    """weight: [V, d].  reads: stream [n, 1, ...] behind the last attention → what is multiplied by the weight, [n, d]."""

    weight: Tensor
    reads: Callable[[Tensor], Tensor]


def find_readout(
    schedule: Schedule, calls: Sequence[tuple[Runner, tuple[int, ...], tuple[Tensor, ...], tuple[str, ...], int]]
) -> Readout | None:
    """Cut the calls behind the last attention in front of the product with the head's weight; None when there is no such.

    calls: those of an executor.  Between the product and the logits there may be operations on each logit, such as a softcap.
    """
    for place in range(len(calls) - 1, schedule.tail - 1, -1):
        graph = schedule.calls[place].program.graph
        product = _last_product(graph)
        if product is None or product.op != "placeholder":
            break
    else:
        return None
    if product is None:
        return None
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    weights = calls[place][2]
    weight = weights[inputs.index(product.all_input_nodes[1]) - 1]
    front = _front(graph, product.all_input_nodes[0])
    before = [(runner, list(given)) for runner, _, given, _, _ in calls[schedule.tail : place]]

    def reads(stream: Tensor) -> Tensor:
        with torch.inference_mode():
            for runner, given in before:
                stream = runner([stream, *given])[0]
            return front([stream, *weights])[0].reshape(-1, weight.shape[1])

    return Readout(weight, reads)


def _last_product(graph: torch.fx.Graph) -> torch.fx.Node | None:
    """The product with a weight nearest to the output, when everything behind it has that one tensor input.

    The stream itself, when the whole graph is such operations; None when it is anything else.
    """
    node = next(iter(reversed(graph.nodes))).args[0][0]
    while node.target not in PRODUCTS:
        if node.op == "placeholder":
            return node if node is next(iter(graph.nodes)) else None
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return node if node.args[1].op == "placeholder" and node.args[2:] in ((), (None,)) else None


def _front(graph: torch.fx.Graph, end: torch.fx.Node) -> Runner:
    """The part of a tail's graph up to a node, with all its inputs."""
    made = torch.fx.Graph()
    copies = {n: made.placeholder(n.name) for n in graph.nodes if n.op == "placeholder"}
    for node in ancestors([end]):
        if node.op != "placeholder":
            copies[node] = made.node_copy(node, lambda n: copies[n])
    made.output((copies[end],))
    return Program(made, (0, len(copies) - 1, 0), 0).eager()
