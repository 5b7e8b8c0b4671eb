"""Read the decoding loop of a `torch.while_loop` in an exported program: counter, buffer of ids, choice, condition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx

from subquad.ir.graph import ancestors, attribute, value_of
from subquad.ir.loop import NONE, Loop, Schedule, Slot
from subquad.ir.refusal import Refusal, user_line
from subquad.passes.recognize.loop_row import CHOICES, WORDS

Node = torch.fx.Node
SHAPING = {
    "unsqueeze",
    "view",
    "reshape",
    "expand",
    "squeeze",
    "to",
    "_to_copy",
    "alias",
    "clone",
    "item",
    "_local_scalar_dense",
}
WRITES = {"index_copy", "index_put", "scatter", "select_scatter", "slice_scatter", "where", "index_fill"}


@dataclass(frozen=True)
class Carried:
    """A decoding loop in a `while_loop` node, and the nodes of its body that matter.

    inputs, outputs: what is carried, before and after an iteration.  buffer, counter: the inputs that hold the ids and the
    next place.  row: where the logits of the last token are read, None when the model reads them itself.
    """

    loop: Loop
    node: Node
    condition: torch.fx.GraphModule
    body: torch.fx.GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    buffer: Node
    counter: Node
    row: Node | None


def find_while_loops(module: torch.fx.GraphModule) -> list[Loop | Refusal]:
    """Every `while_loop` of a graph whose body chooses by argmax or draws: its decoding loop, or the slot that is not filled."""
    return [found.loop if isinstance(found, Carried) else found for found in find_carried(module)]


def find_carried(module: torch.fx.GraphModule) -> list[Carried | Refusal]:
    """As `find_while_loops`, with the nodes."""
    found: list[Carried | Refusal] = []
    for node in module.graph.nodes:
        if node.target is torch.ops.higher_order.while_loop:
            condition, body = (attribute(module, str(part.target)) for part in node.args[:2])
            if any(WORDS.get(_name(n)) in CHOICES for n in body.graph.nodes):
                found.append(_read(node, condition, body))
    return found


def _read(node: Node, condition: torch.fx.GraphModule, body: torch.fx.GraphModule) -> Carried | Refusal:
    source, code = user_line(node)
    if source.startswith("<"):
        source, code = "", ""

    def refuse(slot: str, reason: str) -> Refusal:
        return Refusal(node.name, f"loop: {slot}", reason, source, code, "loop")

    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    outputs = list(next(iter(reversed(body.graph.nodes))).args[0])
    carried = list(zip(inputs, outputs, strict=False))
    counting = [(old, new) for old, new in carried if _counts(old, new)]
    counters = [pair for pair in counting if any(_written(o, n, pair[0]) and not _floating(o) for o, n in carried)]
    if len(counters or counting) != 1:
        found = len(counters or counting)
        return refuse("positions", f"{found} carried integers grow by one per iteration; one is needed.")
    counter = (counters or counting)[0][0]
    buffers = [(old, new) for old, new in carried if _written(old, new, counter)]
    ids = [(old, new) for old, new in buffers if not _floating(old)]
    if len(ids) != 1:
        return refuse("write", f"{len(ids)} carried buffers of ids are written at the counter; one is needed.")
    buffer, written = ids[0]
    behind = ancestors([written])
    choices = [n for n in behind if WORDS.get(_name(n)) in CHOICES]
    if not choices:
        return refuse("choice", "no token is chosen from logits before the buffer is written.")
    choice = choices[-1]
    rows = ("index_select", "select", "slice", "gather")
    row = next((n for n in ancestors([choice]) if _name(n) in rows and _reads(n, counter)), None)
    if row is not None and not any(_is_before(n, counter) for n in row.all_input_nodes):
        return refuse(
            "select", "the row of logits that is read is not the one of the last token, at the counter less one."
        )
    floats = [(old, new) for old, new in buffers if _floating(old)]
    caches = [pair for pair in floats if row is None or pair[0] in ancestors(row.all_input_nodes)]
    told = [pair for pair in floats if pair not in caches]
    rest = [
        pair for pair in carried if pair not in (*buffers, (counter, _after_one(carried, counter))) and not _kept(*pair)
    ]
    flags = [(old, new) for old, new in rest if value_of(old).dtype == torch.bool]
    told += [pair for pair in rest if pair not in flags]
    whole = any(_name(n) == "embedding" and buffer in n.all_input_nodes for n in behind)
    cond = [n for n in condition.graph.nodes if n.op == "call_function"]
    held = Slot("carried", f"{len(caches)} tensors") if caches else NONE
    named = [n for n in ancestors([choice]) if row is not None and _after(n, row, choice)]
    loop = Loop(
        path=node.name, origin="while_loop", source=source, model=Slot("graph", "the body, with the model inlined"),
        context=Slot("full prefix" if whole else "last token", buffer.name), cache=held,
        positions=Slot("counter", counter.name),
        select=Slot("inside the model") if row is None else Slot("last row", f"{counter.name} - 1"),
        processors=tuple(Slot(WORDS[_name(n)], n.name) for n in named), choice=Slot(WORDS[_name(choice)], choice.name),
        write=Slot("slot write", f"{_name(written)} at {counter.name}"),
        stop=tuple(Slot("rows that ended", old.name) for old, _ in flags),
        effects=tuple(Slot("carried", old.name) for old, _ in told),
        bound=Slot("while", " → ".join(_name(n) for n in cond)), result=Slot("carried tensors", f"{len(carried)}"),
        schedules=(Schedule("derived cache", False, "an exported loop keeps its shapes"),
                   Schedule("draft and verify", *_may_draft(whole, row, choice, caches))),
        evidence=("one carried counter, one buffer of ids written at it",),
    )  # fmt: skip
    before, after = (tuple(pair[n] for pair in carried) for n in (0, 1))
    return Carried(loop, node, condition, body, before, after, buffer, counter, row)


def _may_draft(whole: bool, row: Node | None, choice: Node, caches: list[tuple[Node, Node]]) -> tuple[bool, str]:
    """Whether several tokens may be verified in one iteration, and why or why not."""
    if not whole or caches:
        return False, "the body feeds the last token only, so that one pass cannot verify more"
    if row is None:
        return False, "the row of logits is chosen inside the model"
    if WORDS[_name(choice)] != "argmax":
        return False, "tokens are drawn, and a loop in a graph cannot draw again"
    return True, "one pass over the buffer has the logits behind every drafted token"


def _after(node: Node, row: Node, choice: Node) -> bool:
    """True for a named operation between the row and the choice."""
    return node is not choice and _name(node) in WORDS and row in ancestors([node]) and node is not row


def _counts(old: Node, new: Node) -> bool:
    same = isinstance(new, Node) and _name(new) == "add" and new.args[0] is old and new.args[1] == 1
    return bool(same and not _floating(old) and value_of(old).numel() == 1)


def _written(old: Node, new: Node, counter: Node) -> bool:
    """True when the new value is the old one with something written at the counter."""
    if not isinstance(new, Node) or _name(new) not in WRITES or old not in new.all_input_nodes:
        return False
    if _name(new) == "where":
        chosen = new.args[0]
        return (
            isinstance(chosen, Node) and _name(chosen) == "eq" and any(_is(n, counter) for n in chosen.all_input_nodes)
        )
    return any(_is(n, counter) for n in new.all_input_nodes if n is not old)


def _is(node: object, counter: Node) -> bool:
    """True for the counter itself, whatever its shape and dtype."""
    while isinstance(node, Node) and node is not counter and _name(node) in SHAPING:
        node = node.args[0]
    return node is counter


def _is_before(node: Node, counter: Node) -> bool:
    """True for the counter less one."""
    while _name(node) in SHAPING and isinstance(node.args[0], Node):
        node = node.args[0]
    return (_name(node), node.args[1:2]) in (("sub", (1,)), ("add", (-1,))) and _is(node.args[0], counter)


def _reads(node: Node, counter: Node) -> bool:
    return any(counter in ancestors([n]) for n in node.all_input_nodes)


def _after_one(carried: list[tuple[Node, Node]], old: Node) -> Node:
    """What an iteration makes of a carried value."""
    return next(new for one, new in carried if one is old)


def _kept(old: Node, new: Node) -> bool:
    while isinstance(new, Node) and _name(new) in ("clone", "alias", "detach"):
        new = new.args[0]  # type: ignore[assignment]
    return new is old


def _floating(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _name(node: Node) -> str:
    return str(node.target._schema.name.partition("::")[2]) if isinstance(node.target, torch._ops.OpOverload) else ""
