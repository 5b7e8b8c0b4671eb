"""Lets the body of a custom operator use autograd, which the dispatcher switches off there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BLOCKED = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")


@contextmanager
def recording() -> Iterator[None]:
    """Within, operations on tensors that require gradients are recorded even below the autograd dispatch keys."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in _BLOCKED:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
