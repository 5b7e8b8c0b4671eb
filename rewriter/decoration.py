"""`@subquad.rewrite(...)` on an nn.Module class: instances rewrite themselves at their first call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from subquad.ir.errors import SubquadError

PENDING = "_subquad_pending"


def decorate(
    target: type[nn.Module] | None, *, passes: Any, where: str | None, verify: bool
) -> type[nn.Module] | Callable[[type[nn.Module]], type[nn.Module]]:
    """Decorate a class now, or return the decorator when called with options only.

    The class itself, its name and its state_dict keys stay; each instance captures itself with the arguments of its first
    call in eval mode and runs rewritten from then on.  Calls in training mode run the original forward.
    Raises SubquadError when the decorated thing is not an nn.Module class.
    """

    def decorator(cls: type[nn.Module]) -> type[nn.Module]:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise SubquadError(f"@subquad.rewrite decorates nn.Module classes; {cls!r} is none.")
        original = cls.forward

        @functools.wraps(original)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            from subquad.application import rewritten
            from subquad.pipeline import rewrite

            if self.training or rewritten(self) is not None or self.__dict__.get(PENDING):
                return original(self, *args, **kwargs)
            self.__dict__[PENDING] = True
            try:
                rewrite(self, passes=passes, where=where, example_inputs=(args, kwargs), verify=verify)
            finally:
                del self.__dict__[PENDING]
            return self.forward(*args, **kwargs)

        cls.forward = forward
        return cls

    return decorator if target is None else decorator(target)
