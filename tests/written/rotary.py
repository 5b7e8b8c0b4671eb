"""Rotary positions in the three spellings in use: complex numbers, halves and neighbouring pairs."""

from __future__ import annotations

import torch


def _angles(size: int, longest: int) -> torch.Tensor:
    """[longest, size / 2]."""
    rates = 1.0 / (10000.0 ** (torch.arange(0, size, 2).float() / size))
    return torch.outer(torch.arange(longest).float(), rates)


def complex_rotation(size: int, longest: int) -> torch.Tensor:
    """Complex [longest, size / 2]."""
    angles = _angles(size, longest)
    return torch.polar(torch.ones_like(angles), angles)


def half_rotation(size: int, longest: int) -> torch.Tensor:
    """[longest, 2, size]: cosines and sines."""
    angles = torch.cat([_angles(size, longest)] * 2, -1)
    return torch.stack([angles.cos(), angles.sin()], 1)


def interleaved_rotation(size: int, longest: int) -> torch.Tensor:
    """[longest, size / 2, 2]: cosine and sine side by side."""
    angles = _angles(size, longest)
    return torch.stack([angles.cos(), angles.sin()], -1)


def turn_complex(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D] times the unit numbers of its positions."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    freqs = freqs.view(1, pairs.shape[1], 1, pairs.shape[-1])
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


def turn_half(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """x·cos + rotate(x)·sin."""
    cos, sin = freqs[:, 0][None, :, None], freqs[:, 1][None, :, None]
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def turn_pairs(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Neighbouring features are one point of the plane."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    freqs = freqs.view(1, pairs.size(1), 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * freqs[..., 0] - pairs[..., 1] * freqs[..., 1],
            pairs[..., 1] * freqs[..., 0] + pairs[..., 0] * freqs[..., 1],
        ],
        -1,
    )
    return turned.flatten(3).type_as(x)
