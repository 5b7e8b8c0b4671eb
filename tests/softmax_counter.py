"""Counts, while a model runs, every softmax and every attention call that PyTorch really executes, by user source line."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TORCH = str(Path(torch.__file__).parent)
SKIPPED = {__file__}
"""Files whose frames are no user code: this one, and those that build on it."""
COUNTED = {
    "_softmax": "softmax",
    "_safe_softmax": "sdpa",
    "_scaled_dot_product_flash_attention_for_cpu": "sdpa",
    "_scaled_dot_product_flash_attention": "sdpa",
    "_scaled_dot_product_efficient_attention": "sdpa",
    "_scaled_dot_product_cudnn_attention": "sdpa",
    "_scaled_dot_product_fused_attention_overrideable": "sdpa",
    "_native_multi_head_attention": "sdpa",
    "_transformer_encoder_layer_fwd": "sdpa",
    "flex_attention": "sdpa",
}
"""Operators below the dispatcher: whatever was written, one of these runs once for each softmax over scores."""


class SoftmaxCounter(TorchDispatchMode):
    """Inside the block, `lines` counts executions by (operator kind, "file:line").

    kind: "softmax" or "sdpa".  A call site that n layers execute counts n times.  log_softmax is not counted.
    spoil: the number of an execution whose result is made wrong, which shows whether anything depends on it.
    """

    def __init__(self, spoil: int | None = None) -> None:
        super().__init__()
        self.spoil = spoil
        self.lines: Counter[tuple[str, str]] = Counter()

    @property
    def executed(self) -> int:
        """How many softmaxes and attention calls ran."""
        return sum(self.lines.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", func)
        counted = COUNTED.get(getattr(packet, "__name__", ""))
        result = func(*args, **(kwargs or {}))
        if counted is not None:
            if self.spoil == self.executed:
                (result[0] if isinstance(result, tuple) else result).mul_(1.5)
            self.lines[counted, next(iter(user_lines(sys._getframe(1))), "")] += 1
        return result


def unread(run: Callable[[], Sequence[torch.Tensor]]) -> int:
    """How many executed softmaxes reach no output: each is spoilt in turn and the outputs stay what they were.

    run: calls the model and gives its output tensors.  A graph compiler drops such softmaxes as dead code.
    """
    with SoftmaxCounter() as counter:
        want = run()
    dead = 0
    for number in range(counter.executed):
        with SoftmaxCounter(spoil=number):
            got = run()
        dead += all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(want, got, strict=True))
    return dead


def user_lines(frame: FrameType | None) -> list[str]:
    """The lines on the stack that are neither PyTorch's nor ours, innermost first."""
    lines = []
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_TORCH) and name not in SKIPPED and not name.startswith("<"):
            lines.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return lines


def short(source: str) -> str:
    """A source line without the folders above its file's own."""
    return "/".join(Path(source).parts[-2:])
