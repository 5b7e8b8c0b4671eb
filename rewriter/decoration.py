"""`@subquad.rewrite(...)` on an nn.Module class, whose instances rewrite themselves, or on a function with a decoding loop."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

from torch import nn

from subquad.ir.errors import SubquadError

PENDING = "_subquad_pending"


def decorate(target: Any, *, passes: Any, where: str | None, verify: bool) -> Any:
    """Decorate a class or a function now, or return the decorator when called with options only.

    A function or method that holds a decoding loop keeps its signature and its tokens (see `loop_decoration`).  Of a class
    its name and its state_dict keys stay; each instance captures itself with the arguments of its first
    call in eval mode and runs rewritten from then on.  Calls in training mode run the original forward.
    Raises SubquadError when the decorated thing is neither, and for passes of attention sites on a function.
    """

    def decorator(cls: Any) -> Any:
        if isinstance(cls, FunctionType):
            from subquad.loop_decoration import decorate_function
            from subquad.pass_spec import parse_request

            sites, loop, network = parse_request([] if passes is None else passes)
            if sites or network is not None or where is not None:
                raise SubquadError(
                    f"{cls.__qualname__} is a function with a loop; patterns, and passes other than speculate, are for models."
                )
            return decorate_function(cls, loop)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise SubquadError(f"@subquad.rewrite decorates nn.Module classes and functions; {cls!r} is neither.")
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
