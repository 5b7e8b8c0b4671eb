"""Recognise a loop whose source cannot be read by watching one run of it: which module is called, on what, again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from subquad.ir.loop import Loop, Slot
from subquad.ir.refusal import Refusal
from subquad.passes.recognize.loop_function import Reading

LEAST = 3
"""Calls that a recorded run must hold: fewer show no pattern."""
MOST = 64
"""Calls whose arguments are kept."""


@dataclass
class Recording:
    """The outermost calls of modules on token ids during one run: (module, its ids), in order."""

    calls: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    others: int = 0


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Inside the block the outermost module calls of this process are recorded; nothing else changes."""
    made, depth = Recording(), [0]

    def before(module: nn.Module, args: Any) -> None:
        if depth[0] == 0 and next(module.parameters(), None) is not None:
            ids = next((a for a in args if _is_ids(a)), None)
            if ids is None:
                made.others += 1
            elif len(made.calls) < MOST:
                made.calls.append((module, ids.detach().clone()))
        depth[0] += 1

    def after(module: nn.Module, args: Any, out: Any) -> None:
        depth[0] -= 1

    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32)


def recorded_loop(function: Callable[..., Any], found: Recording) -> Reading | Refusal:
    """The loop that a recorded run shows, its sampler and stops taken as they stand; or why it shows none."""
    name = getattr(function, "__qualname__", repr(function))

    def refuse(slot: str, reason: str) -> Refusal:
        return Refusal(name, f"loop: {slot}", reason, "", "", "loop")

    roots = {id(module) for module, _ in found.calls}
    if len(found.calls) < LEAST:
        return refuse(
            "model", f"a recorded run calls a module on token ids {len(found.calls)} times; {LEAST} are needed."
        )
    if len(roots) > 1 or found.others:
        return refuse("model", "a recorded run calls several modules, or calls them with keyword arguments alone.")
    pairs = list(zip(found.calls, found.calls[1:], strict=False))
    grown = [new.shape[1] == old.shape[1] + 1 and torch.equal(new[:, :-1], old) for (_, old), (_, new) in pairs]
    if not all(grown):
        return refuse("context", "in a recorded run the model's tokens are not the tokens before with one more.")
    opaque = Slot("opaque", "the function's own code, run as it stands")
    loop = Loop(
        path=name, origin="function", source="", model=Slot("module", type(found.calls[0][0]).__name__),
        context=Slot("full prefix", "token ids [B, T], one longer at each call"), select=opaque, choice=opaque, write=opaque,
        bound=opaque, result=opaque, evidence=(f"{len(found.calls)} calls recorded; the source could not be read",),
    )  # fmt: skip
    return Reading(loop, found.calls[0][0], frozenset({"tensor"}), opaque)
