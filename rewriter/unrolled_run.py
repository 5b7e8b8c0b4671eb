"""Run an unrolled loop whose copies of the model were rolled up: its calls are answered as those of a loop in Python are."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import nn

from subquad.ir.graph import attribute, hang
from subquad.ir.loop import Slot
from subquad.ir.loop_rewrite import LoopRewrite
from subquad.ir.refusal import Refusal, user_line
from subquad.ir.report import Report
from subquad.loop_decoration import told
from subquad.loop_run import LoopModel, LoopRun, active, bound
from subquad.passes.canonicalize.rolled_loop import Rolled, escaping, rolled
from subquad.passes.recognize.loop_row import CHOICES, WORDS
from subquad.passes.recognize.loop_unrolled import Unrolled, find_unrolled

_CHOOSING = {name for name, word in WORDS.items() if word in CHOICES} - {"max"}


class UnrolledLoop:
    """A callable with the graph's inputs and outputs; `report` says after each call what was done.

    The graph's own operations between the calls run as they stand.
    """

    def __init__(
        self, made: Rolled, found: Unrolled, kept: Slot | None, report: Report, speculation: LoopRewrite | None
    ) -> None:
        uses = frozenset(use for call in found.calls for use in _uses(made, call.out))
        self.made, self.loop, self.report = made, found.loop, report
        self.model = LoopModel(made.model, uses, kept, speculation=speculation)

    @property
    def differentiable(self) -> bool:
        """True when values of the logits leave the loop, so that gradients may be wanted."""
        return self.model.kept is not None

    def __call__(self, *inputs: Any) -> Any:
        """The outputs of the graph on its inputs."""
        model = self.made.model
        for name, place in self.made.held.items():
            if attribute(model, name) is not inputs[place]:
                hang(model, name, inputs[place])
        try:
            with bound(model), active(LoopRun(self.model)):
                return self.made.graph.forward(*inputs)
        finally:
            told(self.report, self.loop, self.model)


def _uses(made: Rolled, out: torch.fx.Node) -> set[str]:
    """How the graph reads what a call returns, in the words of `Reading.uses`."""
    if made.held:
        return {"tensor"}
    found = set()
    for user in out.users:
        key = user.args[1] if len(user.args) > 1 else None
        if user.target is getattr:
            found.add("logits" if key == "logits" else f"attribute {key}")
        elif getattr(user.target, "__name__", "") == "getitem" and isinstance(key, (int, str)):
            found.add("logits" if key == "logits" else f"item {key!r}")
        else:
            found.add("tensor")
    return found


def unrolled_loop(
    module: torch.fx.GraphModule, report: Report, speculation: LoopRewrite | None = None
) -> UnrolledLoop | None:
    """The loop that a graph consists of, rolled up; None when it holds none, or several, with the reason in the report."""
    found = [one for one in find_unrolled(module.graph) if isinstance(one, Unrolled)]
    if len(found) != 1:
        return None
    made = rolled(module, found[0])
    if isinstance(made, Refusal):
        report.refused.append(made)
        return None
    leaving = escaping(module, found[0], _CHOOSING)
    kept = None if leaving is None else Slot("graph output", leaving.name, user_line(leaving)[0])
    return UnrolledLoop(made, found[0], kept, report, speculation)


def loop_module(module: torch.fx.GraphModule, speculation: LoopRewrite | None) -> nn.Module | None:
    """The module with its forward bound to the loop that its graph is; None when it is none."""
    report = Report()
    loop = unrolled_loop(module, report, speculation)
    if loop is None:
        return None
    module.__dict__.update(forward=loop, report=report)
    return module


def unbind_loop(module: nn.Module) -> bool:
    """Undo `loop_module`; False when the module's forward is no such loop."""
    if not isinstance(module.__dict__.get("forward"), UnrolledLoop):
        return False
    del module.__dict__["forward"], module.__dict__["report"]
    return True
