"""Subquad: a graph-rewriting compiler for PyTorch models; importing it registers operators and loads no driver."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import subquad.codegen
import subquad.kernels  # noqa: F401  (registers the operators, so that saved graphs load)
from subquad.kernels.native_code import provide_loader

if TYPE_CHECKING:
    from subquad.application import restore
    from subquad.artifact import load, save
    from subquad.conversion import convert
    from subquad.ir.contract import Contract
    from subquad.ir.errors import SubquadError
    from subquad.ir.plan import Plan
    from subquad.ir.refusal import Refusal
    from subquad.ir.report import Report
    from subquad.packaged_weights import demo_weights
    from subquad.pipeline import inspect, list_passes, rewrite
    from subquad.prefix_cache import PrefixCache
    from subquad.verification import verify

__version__ = "0.1.0"

_HOME = {
    "inspect": "subquad.pipeline",
    "list_passes": "subquad.pipeline",
    "rewrite": "subquad.pipeline",
    "restore": "subquad.application",
    "verify": "subquad.verification",
    "convert": "subquad.conversion",
    "save": "subquad.artifact",
    "load": "subquad.artifact",
    "demo_weights": "subquad.packaged_weights",
    "Contract": "subquad.ir.contract",
    "Plan": "subquad.ir.plan",
    "PrefixCache": "subquad.prefix_cache",
    "Refusal": "subquad.ir.refusal",
    "Report": "subquad.ir.report",
    "SubquadError": "subquad.ir.errors",
}

__all__ = [
    "Contract",
    "Plan",
    "PrefixCache",
    "Refusal",
    "Report",
    "SubquadError",
    "__version__",
    "convert",
    "demo_weights",
    "inspect",
    "list_passes",
    "load",
    "restore",
    "rewrite",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Loads the module that holds a public name at its first use."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'subquad' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def _native_forms() -> None:
    """Load the C++ forms of operators, if this machine's cache has them."""
    importlib.import_module("subquad.compilation").native_forms()


provide_loader(_native_forms)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
