"""The bound forward of a language model whose calls share, at run time, what the rows of their batch have in common."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from subquad.ir.errors import SubquadError
from subquad.runtime.deferred_cache import defer_new
from subquad.runtime.shared_logits import SharedLogits
from subquad.runtime.sharing_plan import SharingPlan, plan_sharing
from subquad.speculative_generate import SpeculativeGenerate

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True, False),
    "return_dict": (None, True),
    "logits_to_keep": (0,),
}
"""Arguments that a call may give beside ids and mask, and the values that leave its logits those of all columns."""


MOVED = 1e-2
"""Relative difference of logits up to which moving a row is rounding: half precision is allowed for, and a row at other
positions differs by more than a tenth."""


class SharedForward:
    """Calls `model(input_ids, attention_mask=…)` of a batch whose rows begin alike, or in groups that do: the common columns
    run once, every row's own behind them.

    All other calls, and batches for which sharing does not pay, run the forward as it was; `sharing` says what the last call
    shared or why nothing was.  The logits are those of all columns; for padding they are zero.  A cache that is handed back is
    computed by the model when it is read.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root, self.inner = root, root.__dict__.get("forward")
        self.signature = inspect.signature(type(root).forward)
        self.__signature__ = self.signature.replace(parameters=list(self.signature.parameters.values())[1:])
        self.watch = SpeculativeGenerate(root, None)
        self.sharing: SharingPlan | None = None
        self.moves: bool | None = None
        """Whether rows padded on the left give what they give without padding, None while that was not tried."""

    @property
    def __code__(self) -> Any:
        """The code object that torch.export looks for on a forward."""
        return type(self).__call__.__code__

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The forward without sharing."""
        return (
            type(self.root).forward(self.root, *args, **kwargs) if self.inner is None else self.inner(*args, **kwargs)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._shared(args, kwargs)
        return self.own(*args, **kwargs) if found is None else found

    def _shared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.sharing = None
        bound = self.signature.bind(self.root, *args, **kwargs)
        given = {name: value for name, value in list(bound.arguments.items())[1:] if value is not None}
        more = given.pop(next((p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD), ""), {})
        given |= {name: value for name, value in more.items() if value is not None}
        ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] < 2:
            return None
        why = self._why_not(mask, given) or self.watch.changed()
        if why is None:
            try:
                decoder = self.watch.decoder()
                why = None if decoder.engine.shares else "the model reads the log-sum-exp of an attention"
            except SubquadError as refusal:
                why = str(refusal)
        if why is not None:
            self.sharing = SharingPlan(ids.shape[0], ids.numel(), ids.numel(), None, why)
            return None
        self.sharing = plan = plan_sharing(ids, mask)
        if plan.sharing is None:
            return None
        padded = plan.sharing.begin.nonzero()
        if len(padded) and not self._may_move(ids, mask, int(padded[0])):
            why = "rows are padded on the left, and the model's positions count padding"
            self.sharing = SharingPlan(plan.rows, plan.tokens, plan.tokens, None, why)
            return None
        with torch.no_grad():
            logits = SharedLogits(decoder.engine, ids, mask, plan.sharing).lazily()
        return self._output(logits, ids, given, args, kwargs)

    def _why_not(self, mask: Any, given: dict[str, Any]) -> str | None:
        for name, value in given.items():
            if name not in NEUTRAL or not any(
                value is one or (type(value) is type(one) and value == one) for one in NEUTRAL[name]
            ):
                return f"the call gives {name}"
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return "the attention mask is not one of padding"
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.root.parameters()):
            return "gradients are recorded; call it under torch.no_grad"
        return None

    def _may_move(self, ids: Tensor, mask: Any, row: int) -> bool:
        """Whether a padded row gives the same logits as its tokens alone; tried once, on one row."""
        if self.moves is None:
            real = mask[row] != 0
            with torch.no_grad():
                padded = self.own(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], use_cache=False)
                alone = self.own(input_ids=ids[row : row + 1, real], use_cache=False)
            one, other = padded.logits[0, real].double(), alone.logits[0].double()
            self.moves = bool((one - other).square().mean().sqrt() <= MOVED * other.square().mean().sqrt())
        return self.moves

    def _output(self, logits: Tensor, ids: Tensor, given: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """The output of the model's own class."""
        from transformers.cache_utils import DynamicCache
        from transformers.modeling_outputs import CausalLMOutputWithPast

        config = self.root.config.get_text_config()  # type: ignore[union-attr, operator]
        cached = given.get("use_cache", getattr(config, "use_cache", False))
        cache = None
        if cached:
            held = ids.clone()
            cache = defer_new(DynamicCache, held, lambda _: self.own(*args, **kwargs).past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
