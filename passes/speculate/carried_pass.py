"""The model's part of a `while_loop` body, told from the rest: one pass over the buffer, or the one-token pass made wide.

A body that is fed one token and writes its keys at the counter is run on several tokens by mapping every operation over them;
only the writes into the caches are joined, so that a token sees the keys of those before it in the same pass (the mask by
position hides those behind it, which `subquad.loop_program` tries).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils import _pytree as pytree

from subquad.ir.graph import ancestors, value_of
from subquad.ir.refusal import Refusal
from subquad.passes.recognize.loop_carried import KEEPING, Carried, cache_write, offset, operation

Node = torch.fx.Node
PRODUCTS = {
    "linear",
    "addmm",
    "mm",
    "bmm",
    "baddbmm",
    "matmul",
    "embedding",
    "convolution",
    "scaled_dot_product_attention",
}
"""What a model is made of; such an operation on the fed token outside the pass would run once per token."""


@dataclass(frozen=True)
class Part:
    """The nodes that one pass computes for all tokens, and those of them that the rest of the body reads."""

    nodes: tuple[Node, ...]
    read: tuple[Node, ...]


def model_part(found: Carried) -> Part | Refusal:
    """The model in a body; a Refusal when it cannot be told from the rest, draws random numbers, or carries what cannot be taken
    back."""
    part = _whole(found) if found.feed is None else _by_token(found)
    if isinstance(part, Part) and (chance := next((n for n in part.nodes if draws(n)), None)) is not None:
        return found.refuse("speculate", f"`{chance.name}` in the model draws random numbers, once per pass.")
    return part


def draws(node: Node) -> bool:
    """True for an operation that reads a random number generator; attention and dropout do where they drop."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    if operation(node).endswith("attention"):
        return bool(given.get("dropout_p", 0.0) != 0.0)
    return not (operation(node) == "dropout" and given.get("train") is False)


def _whole(found: Carried) -> Part | Refusal:
    """The nodes up to the logits: they read the buffer and what is fixed, and of them only the row is read behind."""
    assert found.row is not None
    logits = next((n for n in found.row.all_input_nodes if found.counter not in ancestors([n])), None)
    part = [] if logits is None else [n for n in ancestors([logits]) if n.op != "placeholder"]
    if logits is None or found.moving & set(ancestors([logits])):
        return found.refuse("speculate", "the model reads the counter or a flag, not the buffer alone.")
    inside = set(part)
    for node in part:
        outside = [user for user in node.users if user not in inside]
        if outside and found.buffer in ancestors([node]) and (node is not logits or outside != [found.row]):
            return found.refuse("speculate", f"`{node.name}` of the model is read beside the row of logits.")
    return Part(tuple(part), (logits,))


def _by_token(found: Carried) -> Part | Refusal:
    """The nodes computed from the fed token, the counter, the caches and what is fixed, and from nothing else that changes."""
    assert found.feed is not None
    fed, other = {found.feed}, found.moving - {found.feed} | {found.buffer}
    part: list[Node] = []
    fixed: set[Node] = set()
    for node in found.body.graph.nodes:
        if node.op in ("placeholder", "output") or node is found.feed:
            if node not in other and node is not found.feed:
                fixed.add(node)
            continue
        if draws(node) or not all(n in fed or n in fixed for n in node.all_input_nodes):
            above = ancestors([node])
            odd = next(
                (n for n in above if n in other - {found.buffer}), found.buffer if found.buffer in above else None
            )
            if operation(node) in PRODUCTS and any(n in fed for n in above):
                return found.refuse("speculate", _not_taken_back(node, odd, found))
        elif any(n in fed for n in node.all_input_nodes):
            fed.add(node)
            part.append(node)
        else:
            fixed.add(node)
    for _, new in found.caches:
        if new not in fed:
            return found.refuse(
                "speculate", f"what is written into the cache `{new.name}` is not the fed token's alone."
            )
    inside, written = set(part), {new for _, new in found.caches}
    condition = [n for n in found.condition.graph.nodes if n.op == "placeholder"]
    tested = dict(zip(found.inputs, condition, strict=False))
    for node in {node for pair in found.caches for node in pair}:
        if node in tested and tested[node].users:
            return found.refuse("speculate", f"the loop's condition reads the cache `{node.name}`.")
        beside = [user for user in _readers(node) if user not in inside and user.op != "output"]
        if beside:
            return found.refuse(
                "speculate", f"the cache `{node.name}` is read beside the model, by `{beside[0].name}`."
            )
    read = [n for n in part if n not in written and any(user not in inside for user in n.users)]
    return Part(tuple(part), tuple(read))


def _readers(node: Node) -> list[Node]:
    """The users of a node, and those of its copies in their place."""
    return [one for user in node.users for one in (_readers(user) if operation(user) in KEEPING else [user])]


def _not_taken_back(node: Node, odd: Node | None, found: Carried) -> str:
    if odd is None:
        return f"`{node.name}` in the model reads a random number."
    if odd is found.buffer:
        return f"`{node.name}` in the model reads the buffer beside the fed token."
    why = "which is not written at the counter, so that a draft in it cannot be taken back"
    return f"`{node.name}` in the model reads `{odd.name}`, {why}."


def wide_pass(found: Carried, part: Part, depth: int) -> Callable[..., list[Tensor]]:
    """A function of (guessed buffer, *the body's inputs): what is read of depth + 1 tokens [depth + 1, ...], then the caches.

    The first token is the one that is fed, the others are guessed behind it; near the end of the buffer the last is repeated.
    """
    inputs = [n for n in found.body.graph.nodes if n.op == "placeholder"]
    writes = {new: made for old, new in found.caches if (made := cache_write(old, new, found.counter)) is not None}
    needed = ancestors([*part.read, *writes])
    feed = found.feed
    assert feed is not None

    def run(guessed: Tensor, *values: Any) -> list[Tensor]:
        plain = dict(zip(inputs, values, strict=True))
        counter, room = plain[found.counter], guessed.shape[1]
        mapped: dict[Node, Tensor] = {}
        places = [(counter + n).clamp(max=room - 1) if n else counter for n in range(depth + 1)]
        mapped[found.counter] = torch.stack(places)
        shape, dtype = value_of(feed).shape, value_of(feed).dtype
        guesses = [guessed.index_select(1, (place - 1).reshape(1)).to(dtype).reshape(shape) for place in places]
        tokens = [plain.get(feed, guesses[0])]
        for n in range(1, depth + 1):
            tokens.append(torch.where(places[n] == places[n - 1], tokens[-1], guesses[n]))
        mapped[feed] = torch.stack(tokens)
        for node in needed:
            if node.op == "placeholder" or node is feed or node in mapped:
                continue
            if node.op == "get_attr":
                plain[node] = getattr(found.body, str(node.target))
            elif node in writes:
                plain[node] = _joined(node, *writes[node], plain, mapped)
            elif any(n in mapped for n in node.all_input_nodes):
                mapped[node] = _call(node, plain, mapped)
            else:
                plain[node] = _call(node, plain, {})
        return [*(mapped[n] for n in part.read), *(plain[new] for _, new in found.caches)]

    return run


def _call(node: Node, plain: Mapping[Node, Any], mapped: Mapping[Node, Tensor]) -> Any:
    """An operation's value, mapped over the tokens of its mapped arguments."""
    if operation(node) == "scaled_dot_product_attention" and (found := _attention(node, plain, mapped)) is not None:
        return found
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Node) and leaf in mapped]

    def once(*given: Any) -> Any:
        held = [plain[leaf] if isinstance(leaf, Node) and leaf not in mapped else leaf for leaf in leaves]
        for place, value in zip(places, given, strict=True):
            held[place] = value
        args, kwargs = pytree.tree_unflatten(held, spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return torch.vmap(once)(*(mapped[leaves[n]] for n in places)) if places else once()


def _attention(node: Node, plain: Mapping[Node, Any], mapped: Mapping[Node, Tensor]) -> Tensor | None:
    """Attention of one mapped query per head over keys and values that are not mapped: one call with a row per token."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    query, mask = given.pop("query"), given.pop("attn_mask", None)
    others = [value for value in given.values() if isinstance(value, Node)]
    if (
        query not in mapped
        or mapped[query].shape[-2] != 1
        or given.get("is_causal")
        or any(n in mapped for n in others)
    ):
        return None
    if isinstance(mask, Node):
        seen = mapped.get(mask, plain.get(mask))
        if seen is None or seen.shape[-2] != 1:
            return None
        mask = seen.squeeze(-2).movedim(0, -2) if mask in mapped else seen
    rows = mapped[query].squeeze(-2).movedim(0, -2)
    fixed = {name: plain[value] if isinstance(value, Node) else value for name, value in given.items()}
    out: Tensor = node.target(rows, attn_mask=mask, **fixed)  # type: ignore[operator]
    return out.movedim(-2, 0).unsqueeze(-2)


def _joined(
    node: Node, axis: int, index: Node, source: Node, plain: Mapping[Node, Any], mapped: Mapping[Node, Tensor]
) -> Tensor:
    """A cache with what all tokens write into it."""
    base: Any = node.args[0]
    count = len(mapped[source])
    at = mapped[index].reshape(count) if index in mapped else plain[index].reshape(1).expand(count)
    return plain[base].index_copy(axis, at, torch.cat(list(mapped[source]), axis))  # type: ignore[no-any-return]


def committing(found: Carried, old: Node, new: Node) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A function of (old cache, new cache, first counter, counter behind): the new one where steps were taken, else the old."""
    made = cache_write(old, new, found.counter)
    assert made is not None
    axis, move = made[0], offset(made[1], found.counter) or 0

    def commit(old: Tensor, new: Tensor, first: Tensor, behind: Tensor) -> Tensor:
        places = torch.arange(old.shape[axis], device=old.device)
        taken = (places >= first.reshape(()) + move) & (places < behind.reshape(()) + move)
        return torch.where(taken.reshape([-1 if n == axis else 1 for n in range(old.dim())]), new, old)

    return commit


def example(node: Node) -> Tensor:
    """A tensor of a node's shape, for tracing."""
    value = value_of(node)
    return torch.zeros(value.shape, dtype=value.dtype)
