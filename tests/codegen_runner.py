"""Runs generated kernels under Triton's interpreter: cases as JSON on stdin, largest errors against fp64 on stdout.

A process of its own, since TRITON_INTERPRET is read when kernels are decorated.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from subquad.codegen.recurrence_call import recurrence_backward, recurrence_forward
from subquad.codegen.schedule import Schedule
from subquad.codegen.self_check import on, ratio
from subquad.codegen.softmax_call import softmax_backward, softmax_forward
from subquad.kernels import RecurrenceSpec, SoftmaxSpec, recurrence_reference, softmax_attention_reference
from subquad.kernels.recurrence_arguments import differentiable
from subquad.kernels.surroundings import Epilogue, Prologue, Surroundings, finished, prepared

BLOCKS = Schedule(16, 16, 4)
Case = dict[str, Any]


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest |got - wanted| / (1 + |wanted|); equal infinities and NaNs agree. On a device, whose tiles and sums are its
    own, the RMS of the difference over the RMS of the wanted, where that is less.
    """
    if got.device.type != "cpu":
        return min(error(got.cpu(), wanted), ratio(got, wanted))
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    found = torch.where(same, 0.0, ((got - wanted).abs() / (1 + wanted.abs())).nan_to_num(1e9))
    return float(found.max()) if got.numel() else 0.0


def leaves(given: Case) -> Case:
    """The same arguments in fp64, floating ones requiring gradients."""

    def fresh(x: Any) -> Any:
        return x.detach().double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

    found = {name: [fresh(one) for one in x] if isinstance(x, list) else fresh(x) for name, x in given.items()}
    return found | {"surroundings": {name: fresh(x) for name, x in given["surroundings"].items()}}


def surrounded(case: Case, given: Case) -> Case:
    """The call with the surroundings of the case, their tensors drawn: {"q": {...}, "k": {...}, "o": {...}}."""
    wished = case.get("around", {})
    kinds = {"q": Prologue, "k": Prologue, "o": Epilogue}
    around = Surroundings(**{name: kinds[name](**fields) for name, fields in wished.items()})
    q, k, v = (x[0] if isinstance(x, list) else x for x in (given["q"], given["k"], given["v"]))
    tensors: Case = {}
    for side, x, part in (("q", q, around.q), ("k", k, around.k)):
        angles = torch.rand(case.get("tables", 1), x.shape[1], part.rotary // 2) * 6
        made = {f"{side}_cos": angles.cos() * 1.1, f"{side}_sin": angles.sin() * 1.1}
        tensors |= made | {f"{side}_weight": torch.rand(x.shape[3]) + 0.5}
    tensors |= {"o_weight": torch.rand(v.shape[3]) + 0.5, "o_gate": torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)}
    return given | {"around": around.json(), "surroundings": {name: tensors[name] for name in around.tensors}}


def reference(operator: Any, given: Case) -> Any:
    """The operator's fp64 reference with its surroundings in torch."""
    around, tensors = Surroundings.parse(given["around"]), given["surroundings"]

    def ready(x: Any, side: str) -> Any:
        part = getattr(around, side)
        return [ready(one, side) for one in x] if isinstance(x, list) else prepared(x, part, side, tensors)

    plain = {name: x for name, x in given.items() if name not in ("around", "surroundings")}
    out, *rest = operator(**plain | {side: ready(given[side], side) for side in "qk"})
    return finished(out, around.o, tensors), *rest


def placed(given: Case, device: torch.device) -> Case:
    """The same call on a device."""
    return on(given, device) | {"surroundings": {name: x.to(device) for name, x in given["surroundings"].items()}}


def softmax_case(case: Case) -> dict[str, float]:
    """Errors of o, lse and, where the case asks for them, all gradients."""
    dtype = getattr(torch, case["dtype"])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    h, hkv, d, dv, tq, t = case["shape"]
    batch = case.get("batch", 2)
    given: Case = {"q": draw(batch, tq, h, d), "q_positions": None, "rows": [], "lengths": [], "positions": []}
    given |= {"k": [draw(batch, t, hkv, d)], "v": [draw(batch, t, hkv, dv)], "scalars": [5, -3]}
    given |= {"bias": draw(h, 1, t) if case.get("bias") else None, "sinks": draw(h) if case.get("sinks") else None}
    given["operands"] = [torch.rand(2, t) > 0.3, torch.arange(t) // 7]
    if case.get("ragged"):
        given["lengths"] = [torch.tensor([t, 3])]
        given["q_positions"] = torch.tensor([t, 3])[:, None] - tq + torch.arange(tq)
    if case.get("shared"):
        given |= {"k": [draw(2, 21, hkv, d), given["k"][0]], "v": [draw(2, 21, hkv, dv), given["v"][0]]}
        given["rows"] = [torch.arange(batch) % 2 * (1 - torch.arange(batch) // 3), torch.arange(batch)]
        given["lengths"] = [torch.randint(5, 22, (batch,)), torch.randint(1, t + 1, (batch,))]
        given["q_positions"] = sum(given["lengths"])[:, None] - tq + torch.arange(tq)
    if case.get("pages"):
        heads = 1 if case["pages"] == "rows" else hkv
        given |= {"k": [draw(9, 4, hkv, d)], "v": [draw(9, 4, hkv, dv)]}
        given["rows"] = [torch.randint(-1, 9, (batch, heads, 5))]
        given["lengths"] = [torch.randint(3, 21, (batch,))]
    if case.get("tree"):
        given["operands"] = [torch.ones(2, tq, tq, dtype=torch.bool).tril(), torch.tensor([t - tq, t - tq - 2])]
    given["spec"] = SoftmaxSpec(**case["spec"]).json()
    given = surrounded(case, given)
    device = torch.device(case.get("device", "cpu"))
    blocks = BLOCKS if device.type == "cpu" else None
    moved = placed(given, device)
    got = softmax_forward(moved, blocks, parts=2)
    double = leaves(given)
    wanted = reference(softmax_attention_reference, double)
    found = {"o": error(got[0], wanted[0]), "lse": error(got[1], wanted[1])}
    if not case.get("grad"):
        return found
    do, dlse = torch.randn(got[0].shape, dtype=torch.float64), torch.randn(got[1].shape, dtype=torch.float64)
    real = wanted[1] != -torch.inf
    loss = (wanted[0] * do).sum() + (torch.where(real, wanted[1], 0.0) * dlse).sum()
    inputs = [double["q"], *double["k"], *double["v"], *(x for x in (double["bias"], double["sinks"]) if x is not None)]
    inputs += double["surroundings"].values()
    expected = torch.autograd.grad(loss, inputs, allow_unused=True)
    sides = (do.to(device, dtype), dlse.float().to(device))
    gradients = softmax_backward(moved, *sides, *got, schedule=blocks)
    for index, (one, other) in enumerate(zip(gradients, expected, strict=True)):
        other = torch.zeros_like(inputs[index]) if other is None else other
        found[f"gradient {index}"] = error(one.reshape(other.shape), other)
    return found


def recurrence_case(case: Case) -> dict[str, float]:
    """Errors of every output in one call and in two that hand the state on, and of all gradients."""
    dtype = getattr(torch, case["dtype"])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    h, hkv, d, dv, tokens = case["shape"]
    spec = RecurrenceSpec(**{name: tuple(x) if isinstance(x, list) else x for name, x in case["spec"].items()})
    batch = 1 if case.get("packed") else 2
    q, k, v = draw(batch, tokens, h, d), draw(batch, tokens, hkv, d), draw(batch, tokens, hkv, dv)
    if spec.update == "delta":
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
        if case.get("alike"):
            k = k[:, :1].expand_as(k).contiguous()
    names = ("decay", "beta", "valid", "state", "window_k", "window_v", "seen", "cu_seqlens", "window_gate")
    given: Case = dict.fromkeys(names) | {"q": q, "k": k, "v": v, "spec": spec.json()}
    count = max([text.count("@") and int(text[text.index("w") + 1]) + 1 for text in spec.feature_map])
    for side in ("feature_q", "feature_k"):
        given[side] = [torch.randn(h, d, case.get("hidden", 5)).to(dtype) for _ in range(count)]
    strong = case.get("decay_scale", 1.0)
    if spec.decay == "head":
        given["decay"] = -torch.rand(h) * strong
    elif spec.decay == "token":
        given["decay"] = -torch.rand(batch, tokens, h) * strong
    elif spec.decay == "channel":
        given["decay"] = -torch.rand(batch, tokens, h, d) * strong
    if spec.update == "delta":
        given["beta"] = torch.full((batch, tokens, h), 1.99) if case.get("alike") else torch.rand(batch, tokens, h) * 2
    if spec.window:
        given["window_gate"] = torch.randn(h)
    if case.get("padded"):
        given["valid"] = torch.rand(batch, tokens) > 0.3
        given["valid"][-1] = False
    if case.get("packed"):
        given["cu_seqlens"] = torch.tensor([0, 3, 3, tokens - 5, tokens])
    given = surrounded(case, given)
    double = leaves(given)
    device = torch.device(case.get("device", "cpu"))
    blocks = Schedule(case.get("chunk", 16), 16, 4) if device.type == "cpu" else None
    wanted = reference(recurrence_reference, double)
    got = recurrence_forward(placed(given, device), blocks)
    outputs = ("o", "state", "window k", "window v", "seen")
    found = {name: error(a, b) for name, a, b in zip(outputs, got, wanted, strict=True)}
    if not case.get("packed") and spec.causal:
        cut = case.get("cut", tokens // 3)
        parts = ("q", "k", "v", "valid", "decay", "beta")

        def take(part: slice) -> Case:
            own = {n: given[n] if given[n] is None or given[n].dim() < 2 else given[n][:, part] for n in parts}
            around = given["surroundings"].items()
            return given | own | {"surroundings": {n: x if x.dim() < 3 else x[:, part] for n, x in around}}

        first = recurrence_forward(placed(take(slice(0, cut)), device), blocks)
        carried = dict(zip(("state", "window_k", "window_v", "seen"), first[1:], strict=True))
        schedule = None if case.get("steps") else blocks
        second = recurrence_forward(placed(take(slice(cut, None)), device) | carried, schedule)
        whole = (torch.cat([first[0], second[0]], 1), *second[1:])
        found |= {f"{name} in two": error(a, b) for name, a, b in zip(outputs, whole, wanted, strict=True)}
    if not case.get("grad"):
        return found
    if case.get("state"):
        given["state"], given["seen"] = (
            torch.randn(wanted[1].shape).abs() * 0.1,
            torch.ones(wanted[1].shape[0], dtype=torch.int64),
        )
        rows = wanted[1].shape[0]
        slots = spec.window and spec.sinks + spec.window
        given |= {"window_k": draw(rows, slots, hkv, d), "window_v": draw(rows, slots, hkv, dv)}
        given["seen"] = torch.arange(rows) * 5 + 1 if slots else given["seen"]
        double = leaves(given)
        wanted = reference(recurrence_reference, double)
    sides = [torch.randn(x.shape, dtype=torch.float64) for x in wanted[:4]]
    outputs = [wanted[0], torch.where(wanted[1].isfinite(), wanted[1], 0.0), *wanted[2:4]]
    inputs = [*differentiable(double), *double["surroundings"].values()]
    loss = sum((x * side).sum() for x, side in zip(outputs, sides, strict=True))
    expected = torch.autograd.grad(loss, inputs, allow_unused=True)
    gradients = recurrence_backward(placed(given, device), [side.to(device, dtype) for side in sides], blocks)
    for index, (one, other) in enumerate(zip(gradients, expected, strict=True)):
        found[f"gradient {index}"] = error(one, torch.zeros_like(inputs[index]) if other is None else other)
    return found


def errors(case: Case, seed: int = 0) -> dict[str, float]:
    """Errors of one case by output and gradient."""
    torch.manual_seed(seed)
    return softmax_case(case) if case["op"] == "softmax" else recurrence_case(case)


if __name__ == "__main__":
    for number, wished in enumerate(json.loads(sys.stdin.read())):
        print(json.dumps(errors(wished, number)), flush=True)
