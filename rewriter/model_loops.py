"""The decoding loops of a model or function as `inspect` lists them: its own methods, and `generate` of a Hugging Face model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from subquad.generation_loop import generation_loop
from subquad.ir.loop import Schedule
from subquad.ir.report import Report
from subquad.passes.recognize.loop_function import Reading, read_loop

_INSTALLED = re.compile(r"[/\\](site-packages|dist-packages|lib[/\\]python\d[\d.]*)[/\\]")
DECORATE = Schedule("derived cache", True, "decorate it with @subquad.rewrite; its guards run at the first call")


def add_loops(model: nn.Module, report: Report) -> None:
    """Add the loops of a model's own methods, and of its `generate` when it is a Hugging Face model, to the report.

    Only methods that the user's own classes define are read; a method without a loop over the model itself is no finding.
    """
    for name, function in _own_methods(type(model)).items():
        found = read_loop(function, {next(iter(inspect.signature(function).parameters), "self"): model})
        if isinstance(found, Reading):
            report.loops.append(_told(found, f"{type(model).__name__}.{name}"))
    loop = generation_loop(model)
    if loop is not None:
        report.loops.append(loop)


def _told(found: Reading, path: str) -> Any:
    from subquad.loop_decoration import passes_cache, schedules

    fits = found.loop.context.kind == "full prefix" or passes_cache(found.loop)
    return replace(found.loop, path=path, schedules=(DECORATE,) if fits else schedules(found.loop, None))


def _own_methods(kind: type) -> dict[str, Callable[..., Any]]:
    methods: dict[str, Callable[..., Any]] = {}
    for base in reversed(kind.__mro__):
        for name, value in vars(base).items():
            plain = inspect.unwrap(value) if inspect.isfunction(value) else None
            if (
                plain is not None
                and name not in ("forward", "__init__")
                and not _INSTALLED.search(plain.__code__.co_filename)
            ):
                methods[name] = value
    return methods


def inspect_function(function: Callable[..., Any], arguments: Any) -> Report:
    """The report of a function with a decoding loop, called with these arguments: its loop, or why it has none."""
    from subquad.capture_inputs import arguments_of

    args, kwargs = arguments_of(arguments) if arguments is not None else ((), {})
    given = inspect.signature(function).bind_partial(*args, **kwargs)
    given.apply_defaults()
    found = read_loop(function, given.arguments)
    if isinstance(found, Reading):
        return Report(loops=[_told(found, found.loop.path)])
    return Report(refusals=[found])
