"""Further inputs like given ones, for errors that one call is too little to estimate."""

from __future__ import annotations

import torch


def redrawn(inputs: dict[str, torch.Tensor], draw: int) -> dict[str, torch.Tensor]:
    """Inputs of the same shapes and values: floating numbers in another order, columns of integers too.

    draw: from 1 on; each gives others.  Masks, vectors of integers and what has less than two numbers stay.
    """
    generator = torch.Generator().manual_seed(draw)
    made = {}
    for name, value in inputs.items():
        if value.is_floating_point():
            order = torch.randperm(value.numel(), generator=generator).to(value.device)
            made[name] = value.flatten()[order].view(value.shape)
        elif value.dim() > 1 and value.dtype != torch.bool and "mask" not in name:
            made[name] = value[..., torch.randperm(value.shape[-1], generator=generator).to(value.device)]
        else:
            made[name] = value
    return made
