"""What must hold before a loop's model calls are answered by a decoder; run once per loop, on the arguments of its first call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from subquad.forward_traces import hooked, traceless
from subquad.output_place import WHOLE, spellings
from subquad.runtime.prefix_call import PrefixCall
from subquad.step_model import StepModel, dropping


class Broken(Exception):
    """A guard that failed; `guard` is its name, the message one sentence."""

    def __init__(self, guard: str, sentence: str) -> None:
        super().__init__(sentence)
        self.guard = guard


Call = Callable[..., Any]


def deterministic(root: nn.Module, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> str:
    """Two calls are equal, draw no random numbers and write to no buffer; says so, or raises Broken."""
    if root.training and dropping(root):
        raise Broken("determinism", "the model is in training mode with dropout; call model.eval() first.")
    if (below := hooked(root)) is not None:
        raise Broken(
            "determinism", f"its module `{below}` has a hook on its forward, which would not run; remove it first."
        )
    with torch.no_grad(), traceless(root) as seen:
        again = original(*args, **kwargs)
    if (kind := next(iter(seen), None)) == "random":
        because = ", because it is in training mode; call model.eval() first" if root.training else ""
        raise Broken("determinism", f"the model draws random numbers when it is called{because}.")
    if kind is not None:
        raise Broken("determinism", f"the model writes to its own {kind} when it is called.")
    pairs = zip(_tensors(out), _tensors(again), strict=True)
    if not all(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in pairs):
        raise Broken("determinism", "two calls of the model on the same tokens differ.")
    return "determinism: two calls equal, no random numbers, no buffer written"


def tokens_alone(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises Broken when a call is given what an encoder made, or an encoder's tokens, beside the decoder's own."""
    try:
        given = inspect.signature(type(root).forward).bind_partial(root, *args, **kwargs).arguments
    except TypeError:
        return
    for name, value in list(given.items())[1:]:
        states = [
            t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 3
        ]
        if states and type(value) not in (list, tuple, dict) and name != "inputs_embeds":
            said = f"`{name}` [{', '.join(map(str, states[0].shape))}] beside its tokens"
            raise Broken("context", f"a call is given {said}, as a decoder behind an encoder is; {ONLY}.")
    if "decoder_input_ids" in given and isinstance(given.get("input_ids"), Tensor):
        raise Broken("context", f"a call encodes `input_ids` and decodes `decoder_input_ids`; {ONLY}.")


ONLY = "what is derived answers calls on the tokens of one sequence and their padding mask only"


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def checked(step: StepModel, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[str]:
    """The decoder's rows are the model's: at once, after a step, after a rollback; and later tokens change none.

    out: what the model returned for these arguments.  Returns what was seen; raises Broken with the first guard that fails.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return _rows(step, original, args, kwargs, out)


def _rows(step: StepModel, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[str]:
    given, why = step.bound(args, kwargs)
    if given is None:
        raise Broken("arguments", f"the call is not the captured one: {why}.")
    ids, mask, others = given
    last = ids.shape[1] - 1
    prefix = PrefixCall(step.decoder.engine)
    want = step.last_row(out)
    whole = prefix.row(ids, mask, last, others)
    _same(step, whole, want, "multi-row", "the decoder's row after a prefill")
    if step.rows.kept == "all" and last > 0:
        changed = ids.clone()
        changed[:, -1] = (ids[:, -1] + 1) % step.vocabulary
        earlier = step.logits(original(*_replaced(args, ids, changed), **_named(kwargs, ids, changed)))[:, :-1]
        _same(step, earlier, step.logits(out)[:, :-1], "causality", "rows before a token that was changed")
    for index in range(max(0, last - 2), last + 1):
        stepped = prefix.row(ids, mask, index, others)
    _same(step, stepped, want, "multi-row", "the decoder's row after single steps")
    junk = torch.cat([ids, (ids[:, -1:] + 1) % step.vocabulary], 1)
    if step.decoder.programs.layout.limit is None or junk.shape[1] <= step.decoder.programs.layout.limit:
        longer = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, -1:])], 1)
        prefix.row(junk, longer, last + 1, others)
    _same(step, prefix.row(ids, mask, last, others), want, "rollback", "the decoder's row after a rollback")
    return [
        "causality: every operation outside attention is token by token, every mask is causal (proved on the graph)",
        f"multi-row and rollback: rows agree to {(whole - want).abs().max():.1e}",
    ]


def _same(step: StepModel, found: Tensor, want: Tensor, guard: str, what: str) -> None:
    if not step.alike(found, want):
        raise Broken(guard, f"{what} differ from the model's by {(found - want).abs().max():.1e}.")


def _replaced(args: tuple[Any, ...], old: Tensor, new: Tensor) -> tuple[Any, ...]:
    return tuple(new if value is old else value for value in args)


def _named(kwargs: dict[str, Any], old: Tensor, new: Tensor) -> dict[str, Any]:
    return {key: new if value is old else value for key, value in kwargs.items()}


def readable(step: StepModel, uses: frozenset[str], others: frozenset[str] = frozenset()) -> None:
    """Raises Broken when a loop reads more of a call's result than its logits, and the places spelt `others`."""
    if step.place != WHOLE and not uses <= (allowed := spellings(step.place) | others):
        odd = ", ".join(sorted(uses - allowed))
        raise Broken("result", f"the loop reads the model's result as {odd}, which is more than its logits.")
