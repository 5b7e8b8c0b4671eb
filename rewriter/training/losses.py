"""Next-token cross-entropy and KL to the original's distribution, through a frozen output layer, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 128
"""Rows of the vocabulary-wide matrices that exist at a time."""


def distributions(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Log-probabilities fp32 [n, vocabulary] of hidden rows [n, D]; without a weight `hidden` holds the logits."""
    logits = hidden if weight is None else torch.nn.functional.linear(hidden, weight, bias)
    return logits.float().log_softmax(-1)


class _Mixed(torch.autograd.Function):
    """The gradient of a frozen output layer is made together with the loss, so that logits live for one slice only."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, original: Tensor | None, weight: Tensor | None, bias: Tensor | None, targets: Tensor,
        cross_entropy: float, distillation: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total = hidden.shape[0]
        gradient = torch.empty_like(hidden)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, total, ROWS):
            rows = slice(start, start + ROWS)
            ours, wanted = distributions(hidden[rows], weight, bias), targets[rows, None]
            sums[0] -= ours.gather(-1, wanted).sum().double()
            slope = ours.exp().mul_(cross_entropy + (distillation if original is not None else 0.0))
            if original is not None:
                theirs = distributions(original[rows], weight, bias)
                shares = theirs.exp()
                sums[1] += theirs.sub_(ours).mul_(shares).sum().double()
                slope.sub_(shares, alpha=distillation)
            slope.scatter_add_(-1, wanted, torch.full_like(wanted, -cross_entropy, dtype=slope.dtype))
            slope = (slope / total).to(hidden.dtype)
            gradient[rows] = slope if weight is None else slope @ weight
        ctx.save_for_backward(gradient)
        means = sums / total
        loss = cross_entropy * means[0] + distillation * means[1]
        ctx.mark_non_differentiable(means)
        return loss.float(), means

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None, None


def mixed_loss(
    hidden: Tensor, original: Tensor | None, head: tuple[Tensor, Tensor | None] | None, targets: Tensor,
    cross_entropy: float, distillation: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, [mean CE, mean KL]) of rows that predict `targets` int64 [n].

    hidden: [n, D] with head = (weight [V, D], bias), or logits [n, V] with head None; the head gets no gradient.
    original: what the original model gives in the same place; None leaves the KL out.
    loss = cross_entropy · CE + distillation · KL(original ‖ ours), means over rows, fp32; source: knowledge distillation
    (Hinton et al. 2015, §2, temperature 1).
    """
    weight, bias = head if head is not None else (None, None)
    loss, means = _Mixed.apply(hidden, original, weight, bias, targets, cross_entropy, distillation)
    return loss, means


def transfer_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of a site's output over the target's power, fp32; LoLCATs §3.1 with the scale of the layer taken out."""
    wide = target.float()
    return (prediction.float() - wide).square().mean() / wide.square().mean().clamp_min(1e-12)
