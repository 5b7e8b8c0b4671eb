"""What a captured graph holds for: the sizes it was specialised to, and the values that its forward read out of tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.utils._sympy.printers import PythonPrinter

from subquad.ir.graph import value_of

NAMES: dict[str, Any] = {
    "__builtins__": {"min": min, "max": max, "abs": abs, "int": int, "float": float},
    "math": math,
    "torch": torch,
}
"""What the printed conditions call."""


@dataclass
class Guards:
    """Conditions on the inputs of a captured graph, checked at every call.

    inputs: the names of the graph's inputs.  sizes: for each input its fixed sizes, None where an axis is symbolic.
    conditions: Python expressions over the inputs' shapes.  values: a graph from the inputs to the values that the forward
    read out of tensors while it was captured, and those values.  inference: the forward does something else where gradients
    are recorded.
    """

    inputs: tuple[str, ...] = ()
    sizes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    values: torch.fx.GraphModule | None = None
    expected: tuple[Any, ...] = ()
    inference: bool = False
    _code: tuple[CodeType, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self._code = tuple(compile(condition, "<guard>", "eval") for condition in self.conditions)

    def broken(self, tensors: Sequence[Any]) -> str | None:
        """Why the graph is not the forward's for these inputs, in its captured order; None when it is."""
        if self.inference and torch.is_grad_enabled():
            return (
                "it leaves padded rows zero without gradients only, and was captured so; call it under torch.no_grad()"
            )
        named = dict(zip(self.inputs, tensors, strict=False))
        for name, sizes in self.sizes.items():
            if named[name].is_nested:
                return f"`{name}` is a nested tensor"
            shape = tuple(named[name].shape)
            if len(shape) != len(sizes) or any(s is not None and s != t for s, t in zip(sizes, shape, strict=True)):
                wanted = "×".join("any" if s is None else str(s) for s in sizes)
                return f"`{name}` is {'×'.join(map(str, shape))}, and the graph was captured for {wanted}"
        for condition, code in zip(self.conditions, self._code, strict=True):
            if not eval(code, NAMES, named):
                return f"the graph was captured for sizes with {condition}"
        if self.values is not None:
            found = self.values(*tensors)
            for value, wanted in zip(found, self.expected, strict=True):
                if value.tolist() != wanted:
                    return f"the forward branches on a value that is {value.tolist()}; it was captured with {wanted}"
        return None


def fixed_size(size: Any) -> int | None:
    """The number that a recorded size is, None for a symbolic one; a symbol that was fixed is a number too."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_Integer else None
    return int(size)


def guards_of(program: ExportedProgram, inputs: tuple[str, ...]) -> Guards:
    """The guards of an exported program on its tensor inputs.

    Conditions that export states over the arguments (`L['ids'].size()[1] <= 64`) are restated over the inputs' names.
    """
    sizes = {}
    for node in program.graph.nodes:
        value = value_of(node)
        if node.op == "placeholder" and node.name in inputs and isinstance(value, torch.Tensor):
            sizes[node.name] = tuple(fixed_size(size) for size in value.shape)
    conditions = []
    for stated in getattr(program, "_guards_code", None) or ():
        restated = _restated(stated, inputs)
        if restated is not None:
            conditions.append(restated)
    return Guards(inputs, sizes, tuple(conditions))


def traced_guards(environment: Any, inputs: Mapping[str, torch.Tensor]) -> Guards:
    """The guards of a graph that ran on fake inputs: axes that were fixed, and every size that a branch asked for.

    environment: the ShapeEnv of the run.  inputs: the fake tensors by name.
    """
    axes: dict[str, str] = {}
    sizes: dict[str, tuple[int | None, ...]] = {}
    conditions: list[str] = []
    for name, fake in inputs.items():
        fixed: list[int | None] = []
        for axis, size in enumerate(fake.shape):
            place = f"{name}.shape[{axis}]"
            fixed.append(fixed_size(size))
            if isinstance(size, torch.SymInt) and fixed[-1] is None:
                first = axes.setdefault(str(size.node.expr), place)
                conditions += [f"{place} == {first}"] if first != place else []
        sizes[name] = tuple(fixed)
    printer = PythonPrinter()
    for guard in environment.guards:
        text = printer.doprint(guard.expr)
        stated = re.sub(r"\b[su]\d+\b", lambda found: axes.get(found.group(0), found.group(0)), text)
        if guard.expr.free_symbols and all(str(symbol) in axes for symbol in guard.expr.free_symbols):
            conditions.append(stated)
    return Guards(tuple(inputs), sizes, tuple(dict.fromkeys(conditions)))


def _restated(condition: str, inputs: tuple[str, ...]) -> str | None:
    """The condition over input names; None for one about strides, or about something that is no tensor input."""
    unknown = False

    def name(found: re.Match[str]) -> str:
        nonlocal unknown
        parts = re.findall(r"\[['\"]?(\w+)['\"]?\]", found.group(0))
        for start in range(len(parts)):
            if "_".join(parts[start:]) in inputs:
                return "_".join(parts[start:])
        unknown = True
        return ""

    restated = re.sub(r"L((?:\[['\"]?\w+['\"]?\])+)", name, condition)
    if unknown or "stride()" in restated or "storage_offset" in restated:
        return None
    return restated.replace(".size()", ".shape")
