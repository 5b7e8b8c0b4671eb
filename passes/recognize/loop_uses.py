"""How a loop's source reads what the model's call returns: the tensor itself, its logits, items, other attributes."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from subquad.passes.recognize.loop_names import target_names


def uses_of(tree: ast.AST, call: ast.Call) -> frozenset[str]:
    """Every way in which a function reads the result of a call: "tensor", "logits", "item N", "attribute NAME"."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    first, target = _use(call, parents)
    if target is None:
        return frozenset({first}) if first != "items" else _items(call, parents)
    if isinstance(target, (ast.Tuple, ast.List)):
        read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        places = [n for n, element in enumerate(target.elts) if set(target_names(element)) & read]
        return frozenset(f"item {n}" for n in places)
    names = target_names(target)
    uses: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load):
            use = _use(node, parents)[0]
            uses |= _items(node, parents) if use == "items" else {use}
    return frozenset(uses or {"nothing"})


def _items(node: ast.expr, parents: Mapping[ast.AST, ast.AST]) -> frozenset[str]:
    """The items that `node[:n]` takes."""
    parent = parents[node]
    assert isinstance(parent, ast.Subscript)
    count = parent.slice.upper.value if isinstance(parent.slice, ast.Slice) else 0  # type: ignore[union-attr]
    return frozenset(f"item {n}" for n in range(count))


def _first_items(node: ast.expr) -> bool:
    """True for the slice `:n` with a number n."""
    upper = node.upper if isinstance(node, ast.Slice) and node.lower is None and node.step is None else None
    return isinstance(upper, ast.Constant) and isinstance(upper.value, int) and upper.value >= 0


def _use(node: ast.expr, parents: Mapping[ast.AST, ast.AST]) -> tuple[str, ast.expr | None]:
    """(how a value is read, the target it is bound to)."""
    parent = parents.get(node)
    if isinstance(parent, ast.Attribute):
        return ("logits" if parent.attr == "logits" else f"attribute {parent.attr}"), None
    if isinstance(parent, ast.Subscript) and parent.value is node and isinstance(parent.slice, ast.Constant):
        return ("logits" if parent.slice.value == "logits" else f"item {parent.slice.value!r}"), None
    if isinstance(parent, ast.Subscript) and parent.value is node and _first_items(parent.slice):
        return "items", None
    if isinstance(parent, ast.Assign) and parent.value is node and len(parent.targets) == 1:
        return "", parent.targets[0]
    return "tensor", None
