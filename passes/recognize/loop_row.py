"""What happens to a row of logits in a loop's source: which one is read, what changes it, how a token is chosen."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from subquad.ir.loop import Slot
from subquad.passes.recognize.loop_names import Scope, called_names, names_in, own_nodes, target_names

PLAIN = {
    "squeeze", "unsqueeze", "view", "reshape", "item", "tolist", "flatten", "cpu", "detach", "clone", "contiguous", "numpy",
    "size", "dim", "int", "long", "expand", "min", "indices", "values", "full_like", "zeros_like", "ones_like", "empty_like",
    "tensor", "arange", "range", "len", "float", "isinstance", "roll", "expand_as", "shape", "bool", "ones", "zeros", "full",
}  # fmt: skip
WORDS = {
    "softmax": "softmax", "log_softmax": "log-softmax", "topk": "top-k", "kthvalue": "top-k", "sort": "top-p", "argsort": "top-p",
    "cumsum": "top-p", "masked_fill": "mask", "masked_fill_": "mask", "where": "mask", "scatter": "mask", "scatter_": "mask",
    "index_fill_": "mask", "index_fill": "mask", "fill_": "mask", "to": "cast", "double": "cast", "half": "cast", "type": "cast",
    "bfloat16": "cast", "type_as": "cast", "div": "temperature", "div_": "temperature", "gather": "gather", "bincount": "penalty",
    "index_select": "gather", "unique": "penalty", "argmax": "argmax", "max": "argmax", "multinomial": "multinomial",
    "Categorical": "categorical", "sample": "categorical", "exponential_": "exponential noise", "normalize": "normalise",
    "sum": "normalise", "exp": "exp", "log": "log", "tanh": "softcap", "clamp": "clamp", "rand_like": "noise",
    "randn_like": "noise",
    "choice": "random choice", "choices": "random choice", "triu": "mask", "pow": "penalty",
}  # fmt: skip
CHOICES = {"argmax", "multinomial", "categorical", "random choice", "top-1"}
MERGED = {
    "top-k": {"mask", "top-k", "gather"},
    "top-p": {"mask", "top-p", "gather", "normalise", "bias", "temperature"},
    "exponential noise": {"temperature"},
    "penalty": {"mask", "gather", "penalty", "scale", "temperature"},
}
"""What belongs to a processor that was begun: later operations of these kinds are parts of it."""
GROWING = {"cat", "concat", "hstack", "concatenate", "append"}
"""Calls that join tokens to tokens."""
KEEPING = {"append", "extend", "put", "write", "add"}
"""Methods that keep their argument."""
DEPTH = 3


@dataclass
class Row:
    """What was read: the slots, and the names that hold logits or values computed from them, and those that hold tokens."""

    select: list[Slot] = field(default_factory=list)
    processors: list[Slot] = field(default_factory=list)
    choice: list[Slot] = field(default_factory=list)
    floats: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Simple statements in the order of the text, and the heads of compound ones."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(statement, name, None)
            if isinstance(inner, list) and not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                yield from statements(inner)
        for handler in getattr(statement, "handlers", []):
            yield from statements(handler.body)


def read_row(scope: Scope, body: list[ast.stmt], start: ast.AST | None, known: set[str], depth: int = 0) -> Row:
    """Follow values from the model's call `start` (or from the names in `known`) through a list of statements."""
    row = Row(floats=set(known))
    for statement in statements(body):
        value = getattr(statement, "value", None)
        if not isinstance(value, ast.expr) or (
            isinstance(statement, (ast.Return, ast.Expr)) and depth == 0 and start is not None
        ):
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Call) and _touches(value, row.floats, start):
                _in_place(scope, value, row, start, depth)
            continue
        targets = _targets(statement)
        touched = _touches(value, row.floats, start)
        if isinstance(statement, ast.AugAssign):
            touched = touched or bool(set(target_names(statement.target)) & row.floats)
        stored = [t for t in targets if isinstance(t, ast.Subscript) and names_in(t.value) & row.floats]
        if stored and not touched:
            _processor(row, scope.slot("mask", statement))
            continue
        if not touched:
            if names_in(value) & row.tokens and not called_names(value) & GROWING:
                row.tokens |= {n for t in targets for n in target_names(t)} - row.floats
            continue
        chosen = _events(scope, value, row, start, depth)
        if isinstance(statement, ast.AugAssign):
            word = {ast.Div: "temperature", ast.Mult: "scale"}.get(type(statement.op), "bias")
            row.processors.append(scope.slot(word, statement))
        names = {n for t in targets for n in target_names(t)} - _places(statement, row)
        if chosen:
            row.tokens |= set() if called_names(value) & GROWING else names
            row.floats -= names
        else:
            row.floats |= names
            row.tokens -= names
    return row


def _places(statement: ast.stmt, row: Row) -> set[str]:
    """The names bound to places in the vocabulary, which `sort` and `topk` give beside the values."""
    value, targets = getattr(statement, "value", None), _targets(statement)
    if (
        len(targets) == 1 and isinstance(targets[0], ast.Tuple) and called_names(value) & {"sort", "topk"}
        if value
        else False
    ):
        return set(target_names(targets[0].elts[-1]))  # type: ignore[attr-defined]
    return set()


def _touches(node: ast.AST, floats: set[str], start: ast.AST | None) -> bool:
    return bool(names_in(node) & floats) or (start is not None and any(n is start for n in ast.walk(node)))


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, (ast.AugAssign, ast.AnnAssign)) else []


def _in_place(scope: Scope, call: ast.Call, row: Row, start: ast.AST | None, depth: int) -> None:
    """A call for its effect: on the row (`logits.masked_fill_(...)`), or to keep a token that is chosen in its argument."""
    if (
        isinstance(call.func, ast.Attribute)
        and call.func.attr in KEEPING
        and not names_in(call.func.value) & row.floats
    ):
        trial = Row(floats=set(row.floats))
        chosen = [_events(scope, argument, trial, start, depth) for argument in call.args]
        if any(chosen):
            row.select += trial.select
            row.processors += trial.processors
            row.choice += trial.choice
        return
    _events(scope, call, row, start, depth)


def free_floats(node: ast.AST, floats: set[str]) -> bool:
    """True when an expression holds values of the logits other than as a chosen token."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if WORDS.get(name) in CHOICES and name != "max":
            return False
    if isinstance(node, ast.Name):
        return node.id in floats
    return any(free_floats(child, floats) for child in ast.iter_child_nodes(node))


def _events(scope: Scope, value: ast.expr, row: Row, start: ast.AST | None, depth: int) -> bool:
    """Add what an expression does to the row, innermost first; True when its value is a chosen token."""
    chosen, amounts = False, _amounts(value)
    for node in _inside_out(value):
        if node in amounts or not _touches(node, row.floats, start):
            continue
        if isinstance(node, ast.Subscript) and _selects_row(node):
            row.select.append(scope.slot("last row" if re.search(r"-\s*1\b", ast.unparse(node.slice)) else "row", node))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Div, ast.Mult)):
            _processor(row, scope.slot("temperature" if isinstance(node.op, ast.Div) else "scale", node))
        elif isinstance(node, ast.BinOp):
            _processor(row, scope.slot("bias", node))
        elif isinstance(node, ast.Call) and node is not start:
            chosen = _called(scope, node, row, depth) or chosen
    return chosen


def _amounts(value: ast.expr) -> set[ast.AST]:
    """Largest values, read without their places: `x.max(-1).values`, `x.max(-1)[0]`."""
    found: set[ast.AST] = set()
    for node in ast.walk(value):
        taken = (isinstance(node, ast.Attribute) and node.attr == "values") or (
            isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "0"
        )
        inner = node.value if taken else None  # type: ignore[attr-defined]
        if isinstance(inner, ast.Call) and called_names(ast.Call(inner.func, [], [])) & {"max"}:
            found.add(inner)
    return found


def _inside_out(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield from _inside_out(child)
    yield node


def _selects_row(node: ast.Subscript) -> bool:
    """`x[:, -1]`, `x[0, -1]`, `x[:, cur - 1, :]`, `x[-1]`: an index that stands for one token's place."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if any(re.fullmatch(r"-\s*1:?", ast.unparse(part)) for part in parts):
        return True
    if len(parts) < 2:
        return False
    place = parts[1]
    return isinstance(place, (ast.BinOp, ast.Name)) or (isinstance(place, ast.List) and ast.unparse(place) == "[-1]")


def _called(scope: Scope, call: ast.Call, row: Row, depth: int) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    helper = scope.called(call) if depth < DEPTH and name not in WORDS else None
    if helper is not None:
        arguments = helper.tree.args.args[-len(call.args) :] if call.args else []
        if isinstance(call.func, ast.Attribute) and helper.tree.args.args and helper.tree.args.args[0].arg == "self":
            arguments = helper.tree.args.args[1 : 1 + len(call.args)]
        else:
            arguments = helper.tree.args.args[: len(call.args)]
        given = {
            a.arg
            for a, value in zip(arguments, call.args, strict=False)
            if names_in(value) & row.floats or _is_row(value)
        }
        given |= {k.arg for k in call.keywords if k.arg and names_in(k.value) & row.floats}
        inner = read_row(helper, helper.tree.body, None, given or {a.arg for a in arguments[:1]}, depth + 1)
        row.select += inner.select
        for slot in inner.processors:
            _processor(row, slot)
        row.choice += inner.choice
        return bool(inner.choice)
    word = WORDS.get(name)
    if name == "topk" and any(
        ast.unparse(a) == "1" for a in [*call.args, *(k.value for k in call.keywords if k.arg == "k")]
    ):
        word = "top-1"
    if name == "max" and not _takes_indices(scope, call):
        return False
    if word in CHOICES:
        row.choice.append(scope.slot(word or "", call))
        return True
    if word == "cast" and name == "to" and not re.search(r"dtype|float|half|double", ast.unparse(call)):
        return False
    if word is not None:
        _processor(row, scope.slot(word, call))
    elif name not in PLAIN and name not in GROWING:
        _processor(row, scope.slot("opaque", call))
    return False


def _is_row(value: ast.expr) -> bool:
    return isinstance(value, ast.Subscript) and _selects_row(value)


def _takes_indices(scope: Scope, call: ast.Call) -> bool:
    """`x.max(-1)` gives indices too; `x.max()` and `max(a, b)` do not."""
    return isinstance(call.func, ast.Attribute) and bool(call.args or call.keywords)


def sampler_of(row: Row) -> tuple[tuple[Slot, ...], Slot]:
    """Processors and choice; a probability over exponential noise with argmax is a race, the law of multinomial."""
    kinds = list(dict.fromkeys(slot.kind for slot in row.choice))
    noise = [slot for slot in row.processors if slot.kind == "exponential noise"]
    if noise and "argmax" in kinds:
        kinds[kinds.index("argmax")] = "exponential race"
    last = row.choice[-1]
    return tuple(s for s in row.processors if s not in noise), Slot(" or ".join(kinds), last.detail, last.source)


def kept_best(loop: ast.For | ast.While, row: Row) -> Slot | None:
    """The top-k whose places are told apart into the text that goes on and the token it goes on with."""
    apart = any(
        (isinstance(n, ast.BinOp) and isinstance(n.op, (ast.FloorDiv, ast.Mod)))
        or (
            isinstance(n, ast.Call)
            and called_names(n) & {"divmod", "remainder", "fmod", "floor_divide", "unravel_index"}
        )
        or (isinstance(n, ast.keyword) and n.arg == "rounding_mode")
        for n in own_nodes(loop)
    )
    return next((slot for slot in row.processors if slot.kind in ("top-k", "top-p")), None) if apart else None


def _processor(row: Row, slot: Slot) -> None:
    """Add a processor, or let it be a part of the one before it."""
    before = row.processors[-1].kind if row.processors else ""
    if slot.kind in MERGED.get(before, ()) or before == slot.kind == "bias":
        return
    if slot.kind == "gather":
        slot = Slot("penalty", slot.detail, slot.source)
    row.processors.append(slot)


def all_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call below, nested functions left out."""
    for node in own_nodes(tree):
        if isinstance(node, ast.Call):
            yield node
