"""Computes decayed scores of all token pairs of a chunk, and inverts unit lower triangular matrices, by halves of halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scalar_weights(total: Tensor) -> Tensor:
    """exp(G_i - G_j) for j <= i and 0 above, [.., C, C] of inclusive log decay sums G [.., C, 1].

    The exponent is masked before exp, since above the diagonal it would overflow (Dao and Gu, 2405.21060, §6).
    """
    size = total.shape[-2]
    above = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    return torch.exp((total - total.transpose(-1, -2)).masked_fill(above, -torch.inf))


def channel_scores(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """sum_f x_if y_jf exp(G_if - G_jf) for j <= i and 0 above, [.., C, C] of x, y, G [.., C, F]; C a power of two.

    The later half of a block sees its earlier half through the decay sum at the border: both exponents, from the border
    to i and from j to the border, are at most 0 for any gates, and both sides are a matrix product. Halves are treated
    likewise down to single tokens. Source: Gated Linear Attention (2312.06635), §4.3, with as many levels as fit.
    """
    scores: Tensor = _ChannelScores.apply(x, y, total) if torch.is_grad_enabled() else _channel_scores(x, y, total)
    return scores


def unit_inverse(strict: Tensor) -> Tensor:
    """(I + A)^-1 for strictly lower A [.., C, C]; C a power of two.

    The inverse of a block is that of its halves, joined by -X22 A21 X11: stable where powers of A are not (identical keys
    and beta near 2). Source: DeltaNet (2406.06484), §3.2; flash-linear-attention merges 16-blocks likewise.
    """
    inverse: Tensor = _UnitInverse.apply(strict) if torch.is_grad_enabled() else _unit_inverse(strict)
    return inverse


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Rows [.., C, F] as blocks of 2 * half: the earlier and later halves, [.., C / (2 half), half, F]."""
    blocks = x.unflatten(-2, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _joined(diagonal: Tensor, below: Tensor) -> Tensor:
    """Blocks [.., N, h, h] on the diagonal and [.., N / 2, h, h] below it as blocks [.., N / 2, 2h, 2h]."""
    pairs = diagonal.unflatten(-3, (-1, 2))
    upper = torch.cat([pairs[..., 0, :, :], torch.zeros_like(below)], -1)
    return torch.cat([upper, torch.cat([below, pairs[..., 1, :, :]], -1)], -2)


def _at_border(x: Tensor, y: Tensor, total: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Later rows of x and earlier rows of y decayed to the border between the halves, and those decays."""
    earlier, later = _halves(total, half)
    border = earlier[..., -1:, :]
    to_later, from_earlier = torch.exp(later - border), torch.exp(border - earlier)
    return _halves(x, half)[1] * to_later, _halves(y, half)[0] * from_earlier, to_later, from_earlier


def _channel_scores(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    scores, half = (x * y).sum(-1)[..., None, None], 1
    while half < x.shape[-2]:
        late, early, *_ = _at_border(x, y, total, half)
        scores = _joined(scores, torch.matmul(late, early.transpose(-1, -2)))
        half *= 2
    return scores.squeeze(-3)


class _ChannelScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, total)
        return _channel_scores(x, y, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, y, total = ctx.saved_tensors
        own = grad.diagonal(dim1=-2, dim2=-1)[..., None]
        grad_x, grad_y = own * y, own * x
        half = 1
        while half < x.shape[-2]:
            late, early, to_later, from_earlier = _at_border(x, y, total, half)
            below = grad.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half)).movedim(-3, -4)
            below = below.diagonal(dim1=-6, dim2=-4)[..., 1, :, 0, :, :].movedim(-1, -3)
            _halves(grad_x, half)[1].addcmul_(torch.matmul(below, early), to_later)
            _halves(grad_y, half)[0].addcmul_(torch.matmul(below.transpose(-1, -2), late), from_earlier)
            half *= 2
        return grad_x, grad_y, x * grad_x - y * grad_y


def _unit_inverse(strict: Tensor) -> Tensor:
    size, half = strict.shape[-1], 1
    inverse = strict.new_ones(()).expand(*strict.shape[:-1], 1, 1)
    while half < size:
        blocks = strict.unflatten(-1, (-1, half)).unflatten(-3, (-1, half)).transpose(-2, -3)
        below = blocks.diagonal(-1, -4, -3)[..., ::2].movedim(-1, -3)
        pairs = inverse.unflatten(-3, (-1, 2))
        product = torch.matmul(torch.matmul(pairs[..., 1, :, :], below), pairs[..., 0, :, :])
        inverse = _joined(inverse, -product)
        half *= 2
    return inverse.squeeze(-3)


class _UnitInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, strict: Tensor) -> Tensor:
        inverse = _unit_inverse(strict)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -torch.matmul(torch.matmul(turned, grad), turned).tril(-1)
