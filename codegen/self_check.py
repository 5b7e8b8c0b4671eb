"""Compares generated kernels, forward and gradients, with the fp64 references on small random inputs of given head sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.codegen.expressions import ranks, scalar_count
from subquad.codegen.recurrence_call import recurrence_backward, recurrence_forward
from subquad.codegen.softmax_call import softmax_backward, softmax_forward
from subquad.kernels import RecurrenceSpec, SoftmaxSpec, parse, recurrence_reference, softmax_attention_reference
from subquad.kernels.recurrence_arguments import differentiable

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest RMS of the difference over the RMS of the reference that the self-check accepts, over all outputs and gradients."""
TOKENS = 70
"""Tokens of a check: more than one chunk, and no multiple of one."""
Arguments = dict[str, Any]


def ratio(got: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over the RMS of the wanted finite entries; infinite where one is NaN or infinite alone."""
    got, wanted = got.detach().cpu().double(), wanted.detach().cpu().double()
    if got.numel() == 0:
        return 0.0
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    difference = torch.where(same, 0.0, got - wanted)
    if not bool(difference.isfinite().all()):
        return float("inf")
    scale = torch.where(wanted.isfinite(), wanted, 0.0).square().mean().sqrt()
    return float(difference.square().mean().sqrt() / (scale + 1e-6))


def softmax_arguments(dtype: torch.dtype, spec: str, key_dim: int, value_dim: int) -> Arguments:
    """Random arguments of subquad::softmax_attention on the CPU that fit the spec."""
    generator = torch.Generator().manual_seed(0)
    mask = SoftmaxSpec.parse(spec).mask

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tables = [torch.randint(0, 2, (80,) * rank, generator=generator) for rank in ranks(mask)]
    return {"rows": [], "lengths": [], "positions": []} | {
        "q": draw(2, TOKENS, 4, key_dim), "k": [draw(2, TOKENS, 2, key_dim)], "v": [draw(2, TOKENS, 2, value_dim)],
        "q_positions": None, "bias": None, "sinks": None, "operands": tables, "scalars": [3] * scalar_count(mask),
        "spec": spec,
    }  # fmt: skip


def recurrence_arguments(dtype: torch.dtype, spec: str, key_dim: int, value_dim: int, hidden: int) -> Arguments:
    """Random arguments of subquad::recurrence on the CPU that fit the spec; the keys of a delta rule have length 1."""
    generator = torch.Generator().manual_seed(0)
    what = RecurrenceSpec.parse(spec)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def gate(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    heads, kv_heads = 4, 2
    q, k, v = draw(2, TOKENS, heads, key_dim), draw(2, TOKENS, kv_heads, key_dim), draw(2, TOKENS, kv_heads, value_dim)
    if what.update == "delta":
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
    names = ("decay", "beta", "window_gate", "valid", "state", "window_k", "window_v", "seen", "cu_seqlens")
    given: Arguments = dict.fromkeys(names) | {"q": q, "k": k, "v": v, "spec": spec}
    count = max(parse(text, "feature").indices("w") for text in (*what.feature_map, *what.key_map))
    for side in ("feature_q", "feature_k"):
        given[side] = [draw(heads, key_dim, hidden) * key_dim**-0.5 for _ in range(count)]
    if what.decay in ("head", "token", "channel"):
        from subquad.kernels.recurrence_forms import feature_width

        shapes = {"head": (heads,), "token": (2, TOKENS, heads), "channel": (2, TOKENS, heads, feature_width(given))}
        given["decay"] = -gate(*shapes[what.decay])
    if what.update == "delta":
        given["beta"] = gate(2, TOKENS, heads)
    if what.window:
        given["window_gate"] = gate(heads)
    return given


def softmax_error(device: torch.device, dtype: torch.dtype, spec: str, key_dim: int, value_dim: int) -> float:
    """The largest error ratio of output, log-sum-exp and gradients on `device`."""
    given = softmax_arguments(dtype, spec, key_dim, value_dim)
    double = _fresh(given)
    wanted = softmax_attention_reference(**double)
    moved = on(given, device)
    got = softmax_forward(moved)
    errors = [ratio(a, b) for a, b in zip(got, wanted, strict=True)]
    real = wanted[1] != -torch.inf
    if SoftmaxSpec.parse(spec).empty_rows == "nan" and not bool(real.all()):
        return max(errors)
    do = torch.randn(wanted[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [double["q"], *double["k"], *double["v"]]
    expected = torch.autograd.grad((wanted[0] * do).sum(), inputs)
    gradients = softmax_backward(moved, do.to(dtype).to(device), torch.empty(0, device=device), *got)
    return max(errors + [ratio(a, b) for a, b in zip(gradients, expected, strict=True)])


def recurrence_error(
    device: torch.device, dtype: torch.dtype, spec: str, key_dim: int, value_dim: int, hidden: int
) -> float:
    """The largest error ratio of output, state and gradients on `device`."""
    given = recurrence_arguments(dtype, spec, key_dim, value_dim, hidden)
    double = _fresh(given)
    wanted = recurrence_reference(**double)
    moved = on(given, device)
    got = recurrence_forward(moved)
    errors = [ratio(a, b) for a, b in zip(got[:2], wanted[:2], strict=True)]
    generator = torch.Generator().manual_seed(1)
    do, dstate = (torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in wanted[:2])
    inputs = differentiable(double)
    loss = (wanted[0] * do).sum() + (wanted[1] * dstate).sum()
    expected = torch.autograd.grad(loss, inputs, allow_unused=True)
    grads = [do.to(dtype).to(device), dstate.float().to(device), *(torch.zeros_like(x) for x in got[2:4])]
    gradients = recurrence_backward(moved, grads)
    return max(errors + [ratio(a, b) for a, b in zip(gradients, expected, strict=True) if b is not None])


def on(given: Arguments, device: torch.device) -> Arguments:
    """The same arguments on a device."""

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    return {name: [moved(one) for one in x] if isinstance(x, list) else moved(x) for name, x in given.items()}


def _fresh(given: Arguments) -> Arguments:
    def leaf(x: Any) -> Any:
        return x.detach().double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: [leaf(one) for one in x] if isinstance(x, list) else leaf(x) for name, x in given.items()}
