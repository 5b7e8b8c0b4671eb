"""Leave out of a model's call the positions that say nothing but the order of its tokens."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from subquad.passes.recognize.loop_context import POSITIONS


class Counted(NamedTuple):
    """Arguments of a call that count its tokens and may be left out.

    names: of the keyword arguments.  shifted: they count from the first token that the call's mask shows, so that without
    them every place of a padded row is another; whether the model gives the same is for a guard to say.
    """

    names: tuple[str, ...]
    shifted: bool

    def left_out(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments without them."""
        return {name: value for name, value in kwargs.items() if name not in self.names}


def counted(root: nn.Module, kwargs: dict[str, Any]) -> Counted:
    """The positions in a call that are the places of its tokens [.., T], from the first, or from the first real one."""
    parameters = inspect.signature(type(root).forward).parameters
    masks = [v for name, v in kwargs.items() if "mask" in name and isinstance(v, Tensor) and v.dim() == 2]
    found = {
        name: _shift(value, masks[0] if masks else None)
        for name, value in kwargs.items()
        if isinstance(value, Tensor)
        and "mask" not in name
        and any(word in name for word in POSITIONS)
        and name in parameters
        and parameters[name].default is None
    }
    names = tuple(name for name, shift in found.items() if shift is not None)
    return Counted(names, any(found[name] for name in names))


def _shift(value: Tensor, mask: Tensor | None) -> bool | None:
    """Whether places count from the first real token only; None when they are other numbers."""
    if value.dim() not in (1, 2) or value.is_floating_point() or value.dtype == torch.bool:
        return None
    if bool((value == torch.arange(value.shape[-1], device=value.device)).all()):
        return False
    if mask is None or mask.shape != value.shape:
        return None
    real = mask != 0
    return True if bool(((value == real.cumsum(-1) - 1) | ~real).all()) else None
