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
SELECTING = ("index_select", "select", "slice", "gather", "index")
KEEPING = ("clone", "alias", "detach")


@dataclass(frozen=True)
class Carried:
    """A decoding loop in a `while_loop` node, and the nodes of its body that matter.

    inputs, outputs: what is carried, before and after an iteration.  buffer, counter: the inputs that hold the ids and the
    next place.  row: where the logits of the last token are read, None when the model is fed one token.  feed: the token
    that is fed, None when the model is fed the buffer.  caches: (input, output) of what the model writes at the counter.
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
    feed: Node | None
    caches: tuple[tuple[Node, Node], ...]

    def refuse(self, slot: str, reason: str) -> Refusal:
        """A refusal of this loop."""
        return Refusal(self.node.name, slot, reason, self.loop.source, "", "loop")

    @property
    def moving(self) -> set[Node]:
        """What is carried and changes in ways that a draft does not foretell: neither buffer, counter nor caches."""
        known = {self.buffer, self.counter, *(old for old, _ in self.caches)}
        return {old for old, new in zip(self.inputs, self.outputs, strict=True) if not kept(old, new)} - known


def find_while_loops(module: torch.fx.GraphModule) -> list[Loop | Refusal]:
    """Every `while_loop` of a graph whose body chooses by argmax or draws: its decoding loop, or the slot that is not filled."""
    return [found.loop if isinstance(found, Carried) else found for found in find_carried(module)]


def find_carried(module: torch.fx.GraphModule) -> list[Carried | Refusal]:
    """As `find_while_loops`, with the nodes."""
    found: list[Carried | Refusal] = []
    for node in module.graph.nodes:
        if node.target is torch.ops.higher_order.while_loop:
            condition, body = (attribute(module, str(part.target)) for part in node.args[:2])
            if any(WORDS.get(operation(n)) in CHOICES for n in body.graph.nodes):
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
    choices = [n for n in behind if WORDS.get(operation(n)) in CHOICES]
    if not choices:
        return refuse("choice", "no token is chosen from logits before the buffer is written.")
    choice = choices[-1]
    above = ancestors([choice])
    whole = any(operation(n) == "embedding" and buffer in n.all_input_nodes for n in behind)
    reading = [n for n in above if operation(n) in SELECTING and _place(n, counter) is not None]
    caches = [
        (old, new)
        for old, new in carried
        if _floating(old) and new in above and cache_write(old, new, counter) is not None
    ]
    row = feed = None
    if whole:
        row = next(iter(reading), None)
        if row is not None and _place(row, counter) != -1:
            said = "the row of logits that is read is not the one of the last token, at the counter less one."
            return refuse("select", said)
    else:
        feeds = [n for n in reading if _peeled(n.args[0]) is buffer]
        feeds += [old for old, new in carried if old in above and new is not old and _is_token(old, new, written)]
        if len(feeds) != 1:
            return refuse("context", f"the model is fed {len(feeds)} tokens per iteration; one is needed, the last.")
        feed = feeds[0]
        if feed not in inputs and _place(feed, counter) != -1:
            return refuse("context", "the token that is fed is not the last one, at the counter less one.")
    cached = {old for old, _ in caches}
    rest = [(old, new) for old, new in carried if old not in (buffer, counter, feed, *cached) and not kept(old, new)]
    flags = [(old, new) for old, new in rest if value_of(old).dtype == torch.bool]
    told = [pair for pair in rest if pair not in flags]
    cond = [n for n in condition.graph.nodes if n.op == "call_function"]
    held = Slot("carried", f"{len(caches)} tensors written at {counter.name}") if caches else NONE
    named = [n for n in above if row is not None and _after(n, row, choice)]
    loop = Loop(
        path=node.name, origin="while_loop", source=source, model=Slot("graph", "the body, with the model inlined"),
        context=Slot("full prefix" if whole else "last token", buffer.name if whole or feed is None else feed.name),
        cache=held, positions=Slot("counter", counter.name),
        select=Slot("inside the model") if row is None else Slot("last row", f"{counter.name} - 1"),
        processors=tuple(Slot(WORDS[operation(n)], n.name) for n in named), choice=Slot(WORDS[operation(choice)], choice.name),
        write=Slot("slot write", f"{operation(written)} at {counter.name}"),
        stop=tuple(Slot("rows that ended", old.name) for old, _ in flags),
        effects=tuple(Slot("carried", old.name) for old, _ in told),
        bound=Slot("while", " → ".join(operation(n) for n in cond)), result=Slot("carried tensors", f"{len(carried)}"),
        schedules=(Schedule("derived cache", False, "an exported loop keeps its shapes"),
                   Schedule("draft and verify", *_may_draft(whole, row, cached))),
        evidence=("one carried counter, one buffer of ids written at it",),
    )  # fmt: skip
    before, after = (tuple(pair[n] for pair in carried) for n in (0, 1))
    return Carried(loop, node, condition, body, before, after, buffer, counter, row, feed, tuple(caches))


def _may_draft(whole: bool, row: Node | None, caches: set[Node]) -> tuple[bool, str]:
    """Whether several tokens may be verified in one iteration, and why or why not."""
    if whole and caches:
        return False, "the body feeds its whole buffer and writes a cache too"
    if whole and row is None:
        return False, "the row of logits is chosen inside the model"
    if whole:
        return True, "one pass over the buffer has the logits behind every drafted token"
    return (
        True,
        "one pass over several tokens has the logits behind every drafted one, and writes their keys at their places",
    )


def _after(node: Node, row: Node, choice: Node) -> bool:
    """True for a named operation between the row and the choice."""
    return node is not choice and operation(node) in WORDS and row in ancestors([node]) and node is not row


def _counts(old: Node, new: Node) -> bool:
    same = isinstance(new, Node) and operation(new) == "add" and new.args[0] is old and new.args[1] == 1
    return bool(same and not new.kwargs and not _floating(old) and value_of(old).numel() == 1)


def _written(old: Node, new: Node, counter: Node) -> bool:
    """True when the new value is the old one with something written at the counter."""
    if not isinstance(new, Node) or operation(new) not in WRITES or old not in map(_peeled, new.all_input_nodes):
        return False
    if operation(new) == "where":
        chosen = new.args[0]
        return (
            isinstance(chosen, Node)
            and operation(chosen) == "eq"
            and any(offset(n, counter) == 0 for n in chosen.all_input_nodes)
        )
    return any(offset(n, counter) == 0 for n in new.all_input_nodes if _peeled(n) is not old)


def cache_write(old: Node, new: Node, counter: Node) -> tuple[int, Node, Node] | None:
    """(axis, index, source) when `new` is `old` with a source of one place written at the counter, or at a fixed distance."""
    if (
        not isinstance(new, Node)
        or operation(new) not in ("index_copy", "index_put")
        or _peeled(new.args[0]) is not old
    ):
        return None
    if operation(new) == "index_copy":
        axis, index, source = new.args[1:4]
    else:
        places, source = new.args[1:3]
        axis, index = next(((n, p) for n, p in enumerate(places) if p is not None), (0, None))  # type: ignore[arg-type, union-attr]
        if len([p for p in places if p is not None]) != 1 or len(new.args) > 3:  # type: ignore[union-attr]
            return None
    if not isinstance(index, Node) or not isinstance(source, Node) or offset(index, counter) is None:
        return None
    width = value_of(old).dim()
    return (axis % width, index, source) if isinstance(axis, int) and value_of(source).dim() == width else None


def _is_token(old: Node, new: Node, written: Node) -> bool:
    """True for a carried token: what an iteration makes of it is what it writes into the buffer."""
    source = _bare(new)
    return not _floating(old) and value_of(old).numel() > 0 and source in map(_bare, written.all_input_nodes)


def _bare(node: object) -> object:
    """A node without changes of shape and dtype."""
    while isinstance(node, Node) and operation(node) in SHAPING:
        node = node.args[0]
    return node


def _peeled(node: object) -> object:
    """A node without copies."""
    while isinstance(node, Node) and operation(node) in KEEPING:
        node = node.args[0]
    return node


def offset(node: object, counter: Node) -> int | None:
    """How far behind the counter a value lies, whatever its shape and dtype; None for another value."""
    node = _bare(node)
    if node is counter:
        return 0
    if (
        isinstance(node, Node)
        and operation(node) in ("add", "sub")
        and isinstance(node.args[1], int)
        and not node.kwargs
    ):
        before = offset(node.args[0], counter)
        return None if before is None else before + (node.args[1] if operation(node) == "add" else -node.args[1])
    return None


def _place(node: Node, counter: Node) -> int | None:
    """The distance from the counter at which a selection reads, None when it reads elsewhere."""
    found = [offset(n, counter) for n in node.all_input_nodes[1:]]
    return next((distance for distance in found if distance is not None), None)


def kept(old: Node, new: Node) -> bool:
    """True for what an iteration hands on as it is."""
    return _peeled(new) is old


def _floating(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def operation(node: Node) -> str:
    """The name of a torch operation without its namespace, "" for anything else."""
    return str(node.target._schema.name.partition("::")[2]) if isinstance(node.target, torch._ops.OpOverload) else ""
