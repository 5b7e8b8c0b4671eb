"""From a KernelSpec to Triton source, to a built and cached callable, and to binaries made ahead of time."""

from subquad.codegen.building import SHARED_LIMITS, BuildReport, build, build_all
from subquad.codegen.operator_kernels import operator_kernels
from subquad.codegen.provider import provider
from subquad.codegen.schedule import scheduled
from subquad.codegen.source import emit
from subquad.codegen.surrounded import around_of
from subquad.kernels import provide

provide(provider)

__all__ = ["SHARED_LIMITS", "BuildReport", "around_of", "build", "build_all", "emit", "operator_kernels", "scheduled"]
