"""Hands what stands around an operator to its kernels, and differentiates it: in torch, around the operator's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels.operator_scope import recording
from subquad.kernels.surroundings import Prologue, Surroundings, finished, prepared

Arguments = dict[str, Any]


def surroundings_of(given: Arguments) -> Surroundings:
    """The surroundings of a call: given["around"], their JSON, with given["surroundings"], their tensors by name."""
    return Surroundings.parse(given.get("around", ""))


def around_of(spec: KernelSpec) -> Surroundings:
    """Those surroundings that one kernel loads or stores with: all but what another part of its operator does."""
    if spec.op == "softmax_attention":
        sides = {"forward": "qk" if "partial" in spec.flags else "qko", "merge": "o"}
    else:
        sides = {"prepare": "k", "states": "k", "step": "qko", "output": "qk" if "raw" in spec.flags else "qko"}
    return Surroundings.parse(spec.around).only(*sides.get(spec.part, ""))


def only(around: str, *sides: str) -> str:
    """The surroundings `around` of the sides named, "q", "k" or "o"; "" where they have none."""
    kept = Surroundings.parse(around).only(*sides)
    return "" if kept.empty else kept.json()


def with_only(given: Arguments, *sides: str) -> Arguments:
    """The same call with the surroundings of the sides named."""
    return given | {"around": only(given.get("around", ""), *sides)}


def checked(given: Arguments) -> tuple[Surroundings, dict[str, Tensor]]:
    """The surroundings of a call and their tensors. Raises ValueError naming what is missing or does not fit."""
    around, tensors = surroundings_of(given), given.get("surroundings", {})
    if around.empty:
        return around, {}
    keys = given["k"] if isinstance(given["k"], list | tuple) else [given["k"]]
    if not around.k.empty and (len(keys) > 1 or given.get("rows")):
        raise ValueError(
            "The surroundings have a prologue of k, but keys in several segments, pages or shared rows are finished."
        )
    value = given["v"][0] if isinstance(given["v"], list | tuple) else given["v"]
    around.check(given["q"], keys[0], value, tensors)
    return around, tensors


def pointers(given: Arguments) -> Arguments:
    """What the kernels read of a call's surroundings. Raises ValueError as `checked` does."""
    around, tensors = checked(given)
    q = given["q"]
    found: Arguments = {"table_period": q.shape[1]}
    for name in around.tensors:
        x = tensors[name]
        found[f"{name}_ptr"] = x.to(q.dtype).contiguous() if name == "o_gate" else x.float().contiguous()
        if name.endswith("_cos"):
            side, table = name.removesuffix("_cos"), found[f"{name}_ptr"]
            found[f"{side}_table_stride_b"] = 0 if table.shape[0] == 1 else table.stride(0)
            found[f"{side}_table_stride_t"] = table.stride(1)
    return found


def applied(given: Arguments, sides: str = "qk") -> Arguments:
    """The call on q and k after their prologues, which are torch here. Raises ValueError as `checked` does."""
    around, tensors = checked(given)
    found: Arguments = {}
    for side in sides:
        part: Prologue = getattr(around, side)
        x = given[side]
        found[side] = (
            [prepared(one, part, side, tensors) for one in x]
            if isinstance(x, list)
            else prepared(x, part, side, tensors)
        )
    return with_only(given, *({"q", "k", "o"} - set(sides))) | found


def leaves_of(given: Arguments) -> Arguments:
    """The call on tensors of its own, those of its surroundings among them, that record gradients."""

    def fresh(x: Any) -> Any:
        return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

    found = {name: [fresh(one) for one in x] if isinstance(x, list | tuple) else fresh(x) for name, x in given.items()}
    return found | {"surroundings": {name: fresh(x) for name, x in given.get("surroundings", {}).items()}}


def attention_gradients(
    given: Arguments, grad_o: Tensor, forward: Callable[[Arguments], tuple[Tensor, Tensor]], o: Tensor,
    gradients: Callable[[Arguments, Tensor, Tensor], list[Tensor]],
) -> list[Tensor]:  # fmt: skip
    """Gradients of a softmax attention's inputs, then of the tensors of its surroundings in order.

    gradients: those of the operator alone, [q, *k, *v, ...], for a call, its output and the gradient of that. An epilogue
    needs the operator's own output, which `forward` computes once more.
    """
    around = surroundings_of(given)
    with recording():
        fresh = leaves_of(given)
        tensors = fresh["surroundings"]
        inner = with_only(applied(fresh))
        plain = _detached(inner)
        extra: dict[str, Tensor] = {}
        if not around.o.empty:
            o = forward(plain)[0].detach().requires_grad_()
            names = around.o.tensors()
            sides = [o, *(tensors[name] for name in names)]
            grad_o, *rest = torch.autograd.grad(finished(o, around.o, tensors), sides, grad_o.to(o.dtype))
            extra = dict(zip(names, rest, strict=True))
        found = gradients(plain, o.detach(), grad_o)
        if not (around.q.empty and around.k.empty):
            names = tuple(name for name in around.tensors if name not in extra)
            inputs = [fresh["q"], *fresh["k"], *(tensors[name] for name in names)]
            outputs = [inner["q"], *inner["k"]]
            count = len(outputs)
            back = torch.autograd.grad(
                outputs, inputs, [one.to(out.dtype) for one, out in zip(found, outputs, strict=False)]
            )
            found[:count] = back[:count]
            extra |= dict(zip(names, back[count:], strict=True))
    return [*found, *(extra[name] for name in around.tensors)]


def _detached(given: Arguments) -> Arguments:
    def bare(x: Any) -> Any:
        return x.detach() if isinstance(x, Tensor) else x

    return {name: [bare(one) for one in x] if isinstance(x, list) else bare(x) for name, x in given.items()}


def picked(given: Arguments, pick: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of a call's surroundings with the tokens picked of those that have a row per token [B, T, ..]."""
    batch = given["q"].shape[0]
    return {
        name: x if name.endswith("_weight") else pick(x.expand(batch, *x.shape[1:]))
        for name, x in given.get("surroundings", {}).items()
    }
