"""Sets what holds in the body of a custom operator: autograd, which the dispatcher switches off there, and no autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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


def own_precision(device: str) -> AbstractContextManager[Any]:
    """Within, autocast lowers no product: the operator chooses the dtypes of its own arithmetic."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
