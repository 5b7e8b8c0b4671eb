"""Names in a user's function: what they are bound to, where they are assigned, and the line an expression stands on."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from subquad.ir.loop import Slot

UNKNOWN = object()
SELF_RETURNING = {"eval", "train", "to", "cuda", "cpu", "float", "half", "bfloat16", "double", "requires_grad_"}
"""Methods of a module that return the module itself."""


@dataclass
class Scope:
    """The source of one function and what its free names and arguments are bound to.

    function: unwrapped.  tree: its definition, lines as in the file.  values: arguments by name, where they are known.
    """

    function: Callable[..., Any]
    tree: ast.FunctionDef | ast.AsyncFunctionDef
    file: str
    values: Mapping[str, Any]

    def value(self, expression: ast.AST) -> Any:
        """What a name, a chain of attributes, or a method that returns its module stands for; UNKNOWN otherwise."""
        if isinstance(expression, ast.Name):
            return self._name(expression.id)
        if isinstance(expression, ast.Attribute):
            owner = self.value(expression.value)
            return UNKNOWN if owner is UNKNOWN else inspect_attribute(owner, expression.attr)
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
            return self.value(expression.func.value) if expression.func.attr in SELF_RETURNING else UNKNOWN
        if isinstance(expression, ast.Constant):
            return expression.value
        return UNKNOWN

    def _name(self, name: str) -> Any:
        assigned = [value for target, value in assignments(self.tree) if target == name]
        if assigned:
            one = assigned[0] if len(assigned) == 1 and name not in self.values else None
            return UNKNOWN if one is None or name in names_in(one) else self.value(one)
        if name in self.values:
            return self.values[name]
        code, cells = self.function.__code__, self.function.__closure__ or ()
        if name in code.co_freevars:
            try:
                return cells[code.co_freevars.index(name)].cell_contents
            except ValueError:
                return UNKNOWN
        found = self.function.__globals__.get(name, UNKNOWN)
        return getattr(builtins, name, UNKNOWN) if found is UNKNOWN else found

    def line(self, node: ast.AST) -> str:
        """file:line of a node."""
        return f"{self.file}:{getattr(node, 'lineno', self.tree.lineno)}"

    def slot(self, kind: str, node: ast.AST) -> Slot:
        """A slot filled by the expression at a node."""
        return Slot(kind, said(node), self.line(node))

    def called(self, call: ast.Call) -> Scope | None:
        """The scope of the plain Python function a call runs, with the arguments that are known; None for another callee."""
        target = self.value(call.func)
        owner: tuple[object, ...] = ()
        if inspect.ismethod(target):
            owner, target = (target.__self__,), target.__func__
        if not inspect.isfunction(target) or any(isinstance(arg, ast.Starred) for arg in call.args):
            return None
        try:
            signature = inspect.signature(inspect.unwrap(target))
            given = [self.value(arg) for arg in call.args]
            bound = signature.bind_partial(
                *owner, *given, **{k.arg: self.value(k.value) for k in call.keywords if k.arg}
            )
        except (TypeError, ValueError):
            return None
        known = {name: value for name, value in bound.arguments.items() if value is not UNKNOWN}
        return scope_of(target, known)


def inspect_attribute(owner: Any, name: str) -> Any:
    """An attribute without running a property's code; a module's parameters, buffers and submodules count."""
    try:
        static = inspect.getattr_static(owner, name)
    except AttributeError:
        for table in ("_modules", "_parameters", "_buffers"):
            held = getattr(owner, "__dict__", {}).get(table) or {}
            if name in held:
                return held[name]
        return UNKNOWN
    return UNKNOWN if isinstance(static, property) else getattr(owner, name)


def scope_of(function: Callable[..., Any], values: Mapping[str, Any]) -> Scope | None:
    """The scope of a function; None when its source cannot be had."""
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    tree = None if code is None else _tree(code)
    return None if tree is None else Scope(plain, tree, inspect.getsourcefile(plain) or "", values)


@functools.lru_cache(1024)
def _tree(code: CodeType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The definition that was compiled to some code, its lines as in the file; None when its source cannot be had."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    ast.increment_lineno(tree, first - 1)
    return tree


@functools.lru_cache(4096)
def assignments(tree: ast.AST) -> tuple[tuple[str, ast.expr], ...]:
    """(name, value) of every assignment to a plain name; each name of an unpacked value gets the whole value."""
    return tuple(_assignments(tree))


def _assignments(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in own_nodes(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name in target_names(target):
                    yield name, node.value
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            for name in target_names(node.target):
                value = node.value
                if isinstance(node, ast.AugAssign):
                    value = ast.copy_location(ast.BinOp(ast.Name(name, ast.Load()), node.op, node.value), node)
                    ast.fix_missing_locations(value)
                yield name, value
        elif isinstance(node, ast.NamedExpr):
            yield node.target.id, node.value
        elif isinstance(node, ast.For):
            for name in target_names(node.target):
                yield name, ast.copy_location(ast.Starred(node.iter, ast.Load()), node)


@functools.lru_cache(4096)
def own_nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """Every node below, in the order of the text, nested functions and classes left out."""
    return tuple(_own_nodes(tree))


def _own_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        yield child
        yield from _own_nodes(child)


def target_names(target: ast.expr) -> list[str]:
    """The plain names that an assignment target binds."""
    if isinstance(target, ast.Name):
        return [target.id]
    if isinstance(target, (ast.Tuple, ast.List)):
        return [name for element in target.elts for name in target_names(element)]
    return target_names(target.value) if isinstance(target, ast.Starred) else []


def names_in(node: ast.AST) -> set[str]:
    """The names read below a node."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def called_names(node: ast.AST) -> set[str]:
    """The last names of everything called below a node: `torch.cat` and `x.cat` are both cat."""
    found = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Call):
            found |= (
                {n.func.attr}
                if isinstance(n.func, ast.Attribute)
                else {n.func.id}
                if isinstance(n.func, ast.Name)
                else set()
            )
    return found


def said(node: ast.AST) -> str:
    """The text of a node on one line, shortened."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else text[:97] + "..."
