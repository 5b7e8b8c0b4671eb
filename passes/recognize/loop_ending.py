"""How a loop in a function's source ends, what it hands back, and what else an iteration does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from subquad.ir.loop import NONE, Slot
from subquad.passes.recognize.loop_names import Scope, names_in, own_nodes, target_names
from subquad.passes.recognize.loop_row import KEEPING, Row, free_floats, statements

Loop = ast.For | ast.While
FINISHED = re.compile(r"eos|eot|stop|done|finish|end|unfinished|complete|terminat", re.IGNORECASE)


def bound_of(scope: Scope, loop: Loop) -> Slot:
    """The loop's own head: how often it runs at most."""
    if isinstance(loop, ast.For):
        return Slot("for", ast.unparse(loop.iter), scope.line(loop))
    endless = isinstance(loop.test, ast.Constant) and bool(loop.test.value)
    return Slot("while", "True" if endless else ast.unparse(loop.test), scope.line(loop))


def stops_of(scope: Scope, loop: Loop, row: Row) -> tuple[Slot, ...]:
    """Every `break` and `return` with its condition, and every mask of finished rows, in the order of the text."""
    found: list[Slot] = []
    for statement in statements(loop.body):
        if isinstance(statement, ast.If):
            leaves = [n for n in own_nodes(statement) if isinstance(n, (ast.Break, ast.Return))]
            direct = [n for n in statement.body if isinstance(n, (ast.Break, ast.Return))]
            if leaves and direct:
                kind = "break" if isinstance(direct[0], ast.Break) else "return"
                found.append(Slot(kind, ast.unparse(statement.test), scope.line(statement)))
        elif isinstance(statement, (ast.Assign, ast.AugAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [n for t in targets for n in target_names(t)]
            if any(FINISHED.search(name) for name in names) and names_in(statement.value) & (row.tokens | set(names)):
                found.append(scope.slot("rows that ended", statement))
    return tuple(found)


def result_of(scope: Scope) -> Slot:
    """What the function hands back."""
    returns = [n for n in own_nodes(scope.tree) if isinstance(n, ast.Return) and n.value is not None]
    yields = [n for n in own_nodes(scope.tree) if isinstance(n, (ast.Yield, ast.YieldFrom))]
    if yields:
        return scope.slot("yield", yields[-1])
    return scope.slot("return", returns[-1].value) if returns and returns[-1].value is not None else NONE


def effects_of(scope: Scope, loop: Loop, row: Row, write: Slot) -> tuple[Slot, ...]:
    """What an iteration does beside choosing and writing a token; it runs as it stands."""
    found: list[Slot] = []
    for statement in statements(loop.body):
        line = scope.line(statement)
        if isinstance(statement, ast.Expr) and isinstance(statement.value, (ast.Yield, ast.YieldFrom)):
            found.append(scope.slot("yield", statement.value))
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and line != write.source:
            found.append(scope.slot(_effect(statement.value, row), statement.value))
        elif isinstance(statement, (ast.Assign, ast.AugAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(t, ast.Attribute) for t in targets):
                found.append(scope.slot("attribute", statement))
            elif isinstance(statement, ast.AugAssign) and names_in(statement.value) & row.floats:
                if not set(target_names(statement.target)) & names_in(statement.value):
                    found.append(scope.slot("scores kept", statement))
        elif isinstance(statement, (ast.Assert, ast.Raise, ast.Delete, ast.Global, ast.Nonlocal)):
            found.append(scope.slot(type(statement).__name__.lower(), statement))
    return tuple(found)


def _effect(call: ast.Call, row: Row) -> str:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "print":
        return "print"
    if name in KEEPING and any(free_floats(argument, row.floats) for argument in call.args):
        return "scores kept"
    return {"append": "kept", "extend": "kept"}.get(name, "call")


def floats_escape(scope: Scope, loop: Loop, row: Row) -> Slot | None:
    """Where a value computed from the logits, other than a token, leaves the iteration; None when it does not."""
    for node in _leaving(scope, loop):
        if free_floats(node, row.floats):
            return scope.slot("scores kept", node)
    return None


def _leaving(scope: Scope, loop: Loop) -> Iterator[ast.AST]:
    inside = {id(n) for n in ast.walk(loop)}
    for node in own_nodes(scope.tree):
        if isinstance(node, (ast.Return, ast.Yield)) and node.value is not None:
            yield node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("append", "extend", "put")
        ):
            yield from node.args
        elif (
            isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Attribute) for t in node.targets)
            and id(node) in inside
        ):
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
            yield node


def training(scope: Scope, loop: Loop) -> ast.AST | None:
    """The place where the loop trains: a gradient or an optimiser's step."""
    for node in own_nodes(loop):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr == "backward" or (node.func.attr == "step" and "opt" in owner.lower()):
                return node
    return None
