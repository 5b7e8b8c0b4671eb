"""Read the decoding loop of a Python function from its source: every slot, or a refusal that names the slot and the line."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from subquad.ir.loop import NONE, Loop, Slot
from subquad.ir.refusal import Refusal
from subquad.passes.recognize import loop_ending
from subquad.passes.recognize.loop_context import CACHES, POSITIONS, Context, changing, context_of
from subquad.passes.recognize.loop_names import (
    UNKNOWN,
    Scope,
    assignments,
    names_in,
    own_nodes,
    said,
    scope_of,
)
from subquad.passes.recognize.loop_row import Row, all_calls, kept_best, read_row, sampler_of
from subquad.passes.recognize.loop_uses import uses_of

_INSTALLED = re.compile(r"[/\\](site-packages|dist-packages|lib[/\\]python\d[\d.]*)[/\\]")
UNSEEN = "loop unseen"
"""The kind of a refusal where the source shows no loop over a module at all, so that watching a run may."""
DEPTH = 2
"""How many functions may lie between the decorated one and the model's call."""


@dataclass(frozen=True)
class Reading:
    """A loop and what its replacement must know.

    root: the module that is called.  uses: how the call's result is read: "tensor", "logits", "item N" or "other <name>".
    kept: where a value computed from the logits leaves the loop, None when only tokens do.
    """

    loop: Loop
    root: torch.nn.Module
    uses: frozenset[str]
    kept: Slot | None


@dataclass(frozen=True)
class _Call:
    """The model's call in an iteration: directly, or inside a helper that `outer` calls."""

    root: torch.nn.Module
    call: ast.Call
    scope: Scope
    outer: ast.Call


def read_loop(function: Callable[..., Any], values: Mapping[str, Any]) -> Reading | Refusal:
    """The decoding loop of a function called with these arguments (by name), or the slot that cannot be filled."""
    scope = scope_of(function, values)
    if scope is None:
        name = getattr(function, "__qualname__", repr(function))
        reason = "the source of the function is not available, so its loop cannot be read."
        return Refusal(name, "loop: model", reason, kind=UNSEEN)
    found = list(_readings(scope, DEPTH))
    if not found:
        reason = "no `for` or `while` of it calls an nn.Module once per token."
        return replace(_refusal(scope, scope.tree, "model", reason), kind=UNSEEN)
    readings = [reading for reading in found if isinstance(reading, Reading)]
    return readings[0] if readings else found[0]


def _readings(scope: Scope, depth: int) -> Iterator[Reading | Refusal]:
    loops = [node for node in own_nodes(scope.tree) if isinstance(node, (ast.For, ast.While))]
    for loop in loops:
        calls = list(_model_calls(scope, loop, depth))
        inner = [n for n in own_nodes(loop) if isinstance(n, (ast.For, ast.While))]
        if calls and not any(list(_model_calls(scope, nested, depth)) for nested in inner):
            yield _read(scope, loop, calls)
    if depth > 0:
        for call in all_calls(scope.tree):
            helper = None if module_called(scope, call) else _own_helper(scope, call)
            if helper is not None and helper.tree is not scope.tree:
                yield from _readings(helper, depth - 1)


def _own_helper(scope: Scope, call: ast.Call) -> Scope | None:
    helper = scope.called(call)
    return None if helper is None or (_INSTALLED.search(helper.file) and helper.file != scope.file) else helper


def _model_calls(scope: Scope, tree: ast.AST, depth: int) -> Iterator[_Call]:
    for call in all_calls(tree):
        root = module_called(scope, call)
        if root is not None:
            yield _Call(root, call, scope, call)
        elif depth > 0 and (helper := _own_helper(scope, call)) is not None and helper.function is not scope.function:
            for inner in _model_calls(helper, helper.tree, depth - 1):
                yield replace(inner, outer=call)


def module_called(scope: Scope, call: ast.Call) -> torch.nn.Module | None:
    """The module with parameters that a call runs, directly or by its `forward`."""
    target = scope.value(call.func)
    if target is UNKNOWN and isinstance(call.func, ast.Attribute) and call.func.attr in ("forward", "__call__"):
        target = scope.value(call.func.value)
    if getattr(target, "__name__", "") in ("forward", "__call__") and isinstance(
        getattr(target, "__self__", None), torch.nn.Module
    ):
        target = target.__self__
    if isinstance(target, torch.nn.Module) and next(target.parameters(), None) is not None:
        return target
    return None


def _read(scope: Scope, loop: ast.For | ast.While, calls: list[_Call]) -> Reading | Refusal:
    roots = {id(call.root): call for call in calls}
    if len(roots) > 1:
        names = ", ".join(f"`{said(call.call.func)}`" for call in roots.values())
        return _refusal(
            scope, calls[-1].outer, "model", f"an iteration calls several modules ({names}); put them under one."
        )
    if len(calls) > 1:
        return _refusal(scope, calls[-1].outer, "model", "an iteration calls the model more than once.")
    (found,) = calls
    if (trained := loop_ending.training(scope, loop)) is not None:
        return _refusal(scope, trained, "effects", "the loop trains the model while it decodes.")
    row = _row(scope, loop, found)
    if not row.choice and (kept := kept_best(loop, row)) is not None:
        reason = "the loop keeps several continuations of every text, as beam search does, and is left whole."
        return Refusal(scope.function.__qualname__, "loop: choice", reason, kept.source, kept.detail, "loop")
    if not row.choice:
        return _refusal(scope, found.outer, "choice", "no token is chosen from the logits by a known operation.")
    context, others = _contexts(scope, loop, found, row)
    if context is None:
        reason = "none of the call's arguments grows by the tokens that the loop chooses."
        return _refusal(scope, found.outer, "context", reason)
    cache, positions = _carried(scope, loop, found, others)
    write = context.write
    if write == NONE:
        write = _kept_tokens(scope, loop, row)
    uses = uses_of(found.scope.tree, found.call)
    result = loop_ending.result_of(scope)
    processors, choice = sampler_of(row)
    made = Loop(
        path=scope.function.__qualname__, origin="function", source=scope.line(loop),
        model=scope.slot("module", found.call.func) if found.scope is scope else found.scope.slot("module", found.call.func),
        context=context.slot, window=context.window, cache=cache, positions=positions,
        select=row.select[0] if row.select else Slot("inside the model", said(found.call), found.scope.line(found.call)),
        processors=processors, choice=choice, write=write,
        stop=loop_ending.stops_of(scope, loop, row), bound=loop_ending.bound_of(scope, loop), result=result,
        effects=loop_ending.effects_of(scope, loop, row, write), evidence=(f"source of {scope.function.__qualname__}",),
    )  # fmt: skip
    return Reading(made, found.root, uses, loop_ending.floats_escape(scope, loop, row))


def _row(scope: Scope, loop: ast.For | ast.While, found: _Call) -> Row:
    """What becomes of the row: in the helper that calls the model first, then in the loop."""
    if found.scope is scope:
        row = read_row(scope, loop.body, found.call, set())
        return row if row.choice else _round(scope, loop, found, row)
    inner = read_row(found.scope, found.scope.tree.body, found.call, set())
    returned = next(
        (n.value for n in own_nodes(found.scope.tree) if isinstance(n, ast.Return) and n.value is not None), None
    )
    if returned is not None and not inner.choice and not _samples(found, returned, inner):
        outer = read_row(scope, loop.body, found.outer, set())
    else:
        outer = Row()
        for target, value in assignments(loop):
            if found.outer in list(ast.walk(value)) or names_in(value) & outer.tokens:
                outer.tokens.add(target)
    if not inner.choice and not outer.choice:
        outer = _round(scope, loop, found, outer)
    return Row(
        inner.select + outer.select,
        inner.processors + outer.processors,
        inner.choice + outer.choice,
        outer.floats,
        outer.tokens,
    )


def _round(scope: Scope, loop: ast.For | ast.While, found: _Call, row: Row) -> Row:
    """The row of a loop that calls its model last: the token is chosen in front of the next call."""
    before = list(itertools.takewhile(lambda s: not any(n is found.outer for n in ast.walk(s)), loop.body))
    first = read_row(scope, before, None, row.floats)
    return Row(
        row.select + first.select,
        row.processors + first.processors,
        row.choice + first.choice,
        row.floats | first.floats,
        row.tokens | first.tokens,
    )


def _samples(found: _Call, returned: ast.expr, row: Row) -> bool:
    """True when the helper's return itself chooses a token; the row learns of it."""
    statement = ast.Assign([ast.Name("_chosen", ast.Store())], returned, lineno=returned.lineno)
    start = found.call if found.call in list(ast.walk(returned)) else None
    extra = read_row(found.scope, [statement], start, row.floats)
    row.processors += extra.processors
    row.choice += extra.choice
    row.select += extra.select
    return bool(extra.choice)


def _contexts(
    scope: Scope, loop: ast.For | ast.While, found: _Call, row: Row
) -> tuple[Context | None, list[tuple[str, ast.expr]]]:
    """The context of the first argument that grows or moves, and the other arguments that an iteration changes."""
    given = [("", argument) for argument in found.call.args] + [(k.arg or "", k.value) for k in found.call.keywords]
    if found.scope is not scope:
        given = [(name, _outer_argument(found, argument)) for name, argument in given]
    context: Context | None = None
    others: list[tuple[str, ast.expr]] = []
    changed = changing(loop)
    for name, argument in given:
        if context is None and not name.endswith(("mask", "past_key_values", "cache")):
            made = context_of(scope, loop, argument, row.tokens)
            if made.kind in ("full prefix", "last token", "slice"):
                context = made
                continue
        if names_in(argument) & changed:
            others.append((name, argument))
    return context, others


def _outer_argument(found: _Call, argument: ast.expr) -> ast.expr:
    """What a helper's parameter is in the loop that calls the helper."""
    base = argument
    while isinstance(base, (ast.Subscript, ast.Attribute, ast.Call)):
        base = base.func if isinstance(base, ast.Call) else base.value
    names = [a.arg for a in found.scope.tree.args.args]
    if names and names[0] == "self" and isinstance(found.outer.func, ast.Attribute):
        names = names[1:]
    passed = dict(zip(names, found.outer.args, strict=False)) | {k.arg: k.value for k in found.outer.keywords if k.arg}
    if isinstance(base, ast.Name) and base.id in passed:
        outer = passed[base.id]
        if base is argument:
            return outer
        return ast.copy_location(
            _Substitution(base.id, outer).visit(ast.parse(ast.unparse(argument), mode="eval").body), outer
        )
    return argument


class _Substitution(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.expr) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The value in the name's place."""
        return self.value if node.id == self.name else node


def _carried(
    scope: Scope, loop: ast.For | ast.While, found: _Call, others: list[tuple[str, ast.expr]]
) -> tuple[Slot, Slot]:
    """The cache and the positions that the loop itself carries."""
    cache, positions = NONE, NONE
    for name, argument in others:
        words = (name or ast.unparse(argument)).lower()
        if any(word in words for word in CACHES):
            cache = Slot("passed on", said(argument), scope.line(argument))
        elif any(word in words for word in POSITIONS) or (name == "" and "mask" not in words):
            positions = Slot("counter", said(argument), scope.line(argument))
        elif "mask" in words:
            continue
    if cache == NONE:
        held = _cache_object(found)
        cache = NONE if held is None else Slot("object", said(held), scope.line(held))
    return cache, positions


def _cache_object(found: _Call) -> ast.expr | None:
    """An argument that may be a cache to which the model writes: by its parameter's or its own name, or hidden in `**options`."""
    names = list(inspect.signature(type(found.root).forward).parameters)[1:]
    given = list(zip(names, found.call.args, strict=False)) + [(k.arg or "past", k.value) for k in found.call.keywords]
    for name, argument in given:
        words = f"{name} {argument.id if isinstance(argument, ast.Name) else ''}".lower()
        named = (
            name.startswith("past")
            or ("cache" in words and not name.startswith(("use_", "cache_pos")))
            or "kv" in words
        )
        if named and not isinstance(argument, ast.Constant):
            return argument
    return None


def _kept_tokens(scope: Scope, loop: ast.For | ast.While, row: Row) -> Slot:
    """Where the chosen tokens go when the model is not fed from there."""
    for node in own_nodes(loop):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("append", "extend")
        ):
            if names_in(node) & row.tokens:
                return scope.slot("append", node)
        if isinstance(node, ast.Assign) and names_in(node.value) & row.tokens:
            if any(isinstance(t, ast.Subscript) for t in node.targets):
                return scope.slot("slot write", node)
            if isinstance(node.value, ast.Call) and "cat" in ast.unparse(node.value.func):
                return scope.slot("cat", node.value)
    return NONE


def _refusal(scope: Scope, node: ast.AST, slot: str, reason: str) -> Refusal:
    return Refusal(scope.function.__qualname__, f"loop: {slot}", reason, scope.line(node), said(node), "loop")
