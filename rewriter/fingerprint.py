"""A short hash that tells one model's structure from another's, whatever its dtype or weights."""

from __future__ import annotations

import hashlib

from torch import nn

from subquad.emission import PARAMETERS


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over parameter and buffer names with their shapes, 16 hexadecimal digits; what rewrites added is left out."""
    lines = [
        f"{name}:{tuple(tensor.shape)}"
        for name, tensor in sorted(model.state_dict(keep_vars=True).items())
        if not any(part.startswith(PARAMETERS) for part in name.split("."))
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
