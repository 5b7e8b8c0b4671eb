"""What a loop feeds its model: the whole prefix, its last token, or a slice of a buffer, and how that grows."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from subquad.ir.loop import NONE, Slot
from subquad.passes.recognize.loop_names import Scope, assignments, names_in, target_names
from subquad.passes.recognize.loop_row import GROWING, all_calls

SHAPING = {"to", "long", "int", "clone", "contiguous", "unsqueeze", "view", "reshape", "cuda", "cpu", "tensor", "as_tensor",
           "stack", "LongTensor", "squeeze", "flatten", "type", "expand", "detach", "list", "tuple"}  # fmt: skip
CACHES = ("past", "cache", "kv", "mems", "memory_states", "state", "hidden")
POSITIONS = ("pos", "start", "offset", "step", "cur_len", "index")
WRITING = {"index_copy_", "index_copy", "scatter_", "scatter", "index_put_", "select_scatter", "slice_scatter", "copy_"}


@dataclass(frozen=True)
class Context:
    """What one argument of the model's call is: "full prefix", "last token", "slice", or "invariant"."""

    kind: str
    slot: Slot
    window: Slot = NONE
    write: Slot = NONE


def context_of(
    scope: Scope, loop: ast.For | ast.While, expression: ast.expr, tokens: set[str], depth: int = 0
) -> Context:
    """Classify an argument of the call by how the loop changes what it is made of.

    tokens: names that hold the chosen token.
    """
    node = peeled(expression)
    if isinstance(node, ast.IfExp):
        parts = [context_of(scope, loop, part, tokens, depth + 1) for part in (node.body, node.orelse)]
        grown = [part for part in parts if part.kind == "full prefix"]
        if len(grown) == 2:
            cropped = [part.window for part in parts if part.window != NONE]
            return Context("full prefix", grown[0].slot, cropped[0] if cropped else NONE, grown[0].write)
        return parts[0] if parts[0].kind == parts[1].kind else Context("unknown", scope.slot("unknown", expression))
    if isinstance(node, ast.Subscript):
        return _sliced(scope, loop, node, tokens, depth)
    if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) == 1:
        return context_of(scope, loop, node.elts[0], tokens, depth + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined(scope, loop, node, [node.left, node.right], tokens, depth)
    if isinstance(node, ast.Call) and _name(node) in GROWING and node.args:
        first = node.args[0]
        if isinstance(first, ast.Name):
            return context_of(scope, loop, first, tokens, depth + 1)
        return _joined(
            scope, loop, node, list(first.elts) if isinstance(first, (ast.List, ast.Tuple)) else [], tokens, depth
        )
    if isinstance(node, ast.Name):
        return _named(scope, loop, node, tokens, depth)
    return Context("invariant", scope.slot("invariant", expression))


def peeled(expression: ast.expr) -> ast.expr:
    """The expression without changes of shape, dtype and device."""
    while isinstance(expression, ast.Call) and _name(expression) in SHAPING:
        function = expression.func
        if isinstance(function, ast.Attribute) and not (
            isinstance(function.value, ast.Name) and function.value.id == "torch"
        ):
            expression = function.value
        elif expression.args:
            expression = expression.args[0]
        else:
            break
    return expression


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _joined(
    scope: Scope, loop: ast.For | ast.While, node: ast.expr, parts: list[ast.expr], tokens: set[str], depth: int
) -> Context:
    kinds = [context_of(scope, loop, part, tokens, depth + 1).kind for part in parts]
    grows = "full prefix" in kinds
    return Context("full prefix" if grows else "unknown", scope.slot("full prefix" if grows else "unknown", node))


def _sliced(scope: Scope, loop: ast.For | ast.While, node: ast.Subscript, tokens: set[str], depth: int) -> Context:
    base = context_of(scope, loop, node.value, tokens, depth + 1)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    cut = next((part for part in reversed(parts) if isinstance(part, ast.Slice) and (part.lower or part.upper)), None)
    if cut is None or base.kind != "full prefix":
        place = next((p for p in parts if ast.unparse(p) in ("-1", "[-1]", "None")), None)
        return (
            Context("last token", scope.slot("last token", node), write=base.write)
            if place is not None and base.kind == "full prefix"
            else base
        )
    if cut.lower is None:
        return Context("full prefix", scope.slot("full prefix", node), base.window, base.write)
    if cut.upper is None and ast.unparse(cut.lower) == "-1":
        return Context("last token", scope.slot("last token", node), write=base.write)
    if cut.upper is None:
        return Context("full prefix", base.slot, scope.slot("crop", node), base.write)
    return Context("slice", scope.slot("slice", node), write=base.write)


def _named(scope: Scope, loop: ast.For | ast.While, node: ast.Name, tokens: set[str], depth: int) -> Context:
    name = node.id
    for target, value in assignments(loop):
        if target != name or depth > 6:
            continue
        inner = peeled(value)
        if isinstance(inner, ast.Call) and _name(inner) in GROWING and name in names_in(inner):
            return Context("full prefix", Slot("full prefix", name, scope.line(node)), write=scope.slot("cat", value))
        if isinstance(inner, ast.Call) and _name(inner) == "pad" and name in names_in(inner):
            return Context("full prefix", Slot("full prefix", name, scope.line(node)), write=scope.slot("pad", value))
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add) and name in names_in(inner):
            return Context(
                "full prefix", Slot("full prefix", name, scope.line(node)), write=scope.slot("append", value)
            )
        if isinstance(inner, ast.Call) and _name(inner) in WRITING and name in names_in(inner):
            return Context(
                "full prefix", Slot("full prefix", name, scope.line(node)), write=scope.slot("slot write", value)
            )
        if name in names_in(value) and name not in tokens:
            return Context("unknown", Slot("unknown", name, scope.line(node)))
        if names_in(value) & tokens or name in tokens:
            return Context("last token", Slot("last token", name, scope.line(node)), write=scope.slot("rebind", value))
        if name not in names_in(value):
            return context_of(scope, loop, value, tokens, depth + 1)
    write = _written(scope, loop, name)
    if write is not None:
        return Context("full prefix", Slot("full prefix", name, scope.line(node)), write=write)
    if name in tokens:
        return Context("last token", Slot("last token", name, scope.line(node)))
    return Context("invariant", Slot("invariant", name, scope.line(node)))


def _written(scope: Scope, loop: ast.For | ast.While, name: str) -> Slot | None:
    """How the loop writes into what a name holds, without binding the name again."""
    for node in ast.walk(loop):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id == name:
                    return scope.slot("slot write", node)
    for call in all_calls(loop):
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        while isinstance(owner, ast.Subscript):
            owner = owner.value
        if isinstance(owner, ast.Name) and owner.id == name and isinstance(call.func, ast.Attribute):
            if call.func.attr in ("append", "extend"):
                return scope.slot("append", call)
            if call.func.attr in WRITING:
                return scope.slot("slot write", call)
    return None


def changing(loop: ast.For | ast.While) -> set[str]:
    """The names that an iteration binds."""
    names = {target for target, _ in assignments(loop)}
    for node in ast.walk(loop):
        if isinstance(node, ast.With):
            names |= {n for item in node.items if item.optional_vars for n in target_names(item.optional_vars)}
    return names | (set(target_names(loop.target)) if isinstance(loop, ast.For) else set())
