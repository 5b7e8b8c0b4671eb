"""What an attention costs as written and as rewritten, on a machine of two numbers, and whether a rewrite pays."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import dtype_of, shape_of, value_of
from subquad.ir.site import Site
from subquad.ir.vocabulary import arguments, kind

Node = torch.fx.Node
BATCH, TIME, KEYS = sympy.symbols("B T S", integer=True, positive=True)
"""Rows of the batch, queries and keys; the keys of a site in its full phase are its queries, TIME."""

UNKNOWN_SIZE = 128
"""Stands for a size that the capture recorded no example of."""
VIEWS = {
    "view", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "t", "permute", "slice", "select", "narrow", "split",
    "split_with_sizes", "chunk", "getitem", "sym_size", "dropout", "assertion",
}  # fmt: skip
"""Kinds that move nothing; dropout is one because a site whose dropout acts is no site."""


@dataclass(frozen=True)
class Machine:
    """How fast a device moves bytes and computes; only their ratio to each other decides.

    A call has no fixed cost here: examples are mostly shorter than what a model runs on, where it would decide everything.
    """

    bytes_per_second: float
    operations_per_second: float


MACHINES = {"cpu": Machine(30e9, 170e9), "cuda": Machine(3.35e12, 989e12)}
"""cpu: two cores of a current server, measured as the reading rate of main memory and an fp32 matrix product.  cuda: NVIDIA's
data sheet of the H100 SXM, HBM3 and dense bf16; it stands for every other accelerator too."""


@dataclass(frozen=True)
class Cost:
    """One call's memory traffic in bytes and its arithmetic operations, as expressions in BATCH, TIME and KEYS."""

    bytes: sympy.Expr
    operations: sympy.Expr

    def seconds(self, machine: Machine, sizes: dict[sympy.Symbol, int]) -> float:
        """Time on a machine that moves and computes one after the other; sizes: a value for each of the symbols."""
        moved, computed = (float(expression.subs(sizes)) for expression in (self.bytes, self.operations))
        return moved / machine.bytes_per_second + computed / machine.operations_per_second


@dataclass(frozen=True)
class Prediction:
    """Seconds of one call of a site as written and as rewritten, at the sizes of the inputs it was captured with."""

    original_seconds: float
    rewritten_seconds: float
    batch: int
    tokens: int
    keys: int
    device: str


@dataclass(frozen=True)
class Declined:
    """A site that an exact rewrite admits and that keeps its own form, because the rewrite is predicted to gain nothing.

    path: the site's.  rewrite: the pass as written.  reason: one sentence.
    """

    path: str
    rewrite: str
    reason: str
    predicted: Prediction

    def json(self) -> dict[str, Any]:
        """The public words of a declined site: path, rewrite, reason, predicted."""
        return asdict(self)


def predict(site: Site, cost: Cost) -> Prediction:
    """What the site costs as written, and what a rewrite of the given cost would, on the device it was captured on."""
    value = value_of(site.out)
    device = value.device.type if isinstance(value, torch.Tensor) else "cpu"
    machine = MACHINES.get(device, MACHINES["cuda"])
    batch, tokens, keys = (_number(_size(site, *where)) for where in (("q", 0), ("q", 1), ("k", 1)))
    sizes = {BATCH: batch, TIME: tokens, KEYS: keys}
    before, after = original_cost(site).seconds(machine, sizes), cost.seconds(machine, sizes)
    return Prediction(before, after, batch, tokens, keys, device)


def declined(site: Site, rewrite: str, cost: Cost) -> Declined | None:
    """None when a rewrite of the given cost is predicted to be faster than the site as written, otherwise why it is not."""
    predicted = predict(site, cost)
    if predicted.rewritten_seconds < predicted.original_seconds:
        return None
    reason = (
        f"{rewrite} is predicted to gain nothing on {predicted.batch}×{predicted.tokens} tokens on {predicted.device}; "
        "name the pass to apply it all the same."
    )
    return Declined(site.path, rewrite, reason, predicted)


def original_cost(site: Site) -> Cost:
    """The site as its graph spells it: every operation reads its operands and writes its result.

    A softmax spelled out moves the scores [B, H, T, S] at each step; an SDPA call moves its operands once, and a mask given
    as a tensor once per head.  Repeated heads are copies; views are free.  Only `is_causal` halves the products.
    """
    nodes = [node for node in dict.fromkeys((*site.absorbed, site.out)) if _moves(node)]
    steps = [node for node in nodes if kind(node) not in ("matmul", "einsum", "sdpa")]
    moved = sum((_bytes(site, node) + sum(_reads(site, node)) for node in nodes), sympy.S.Zero)
    halved = any(kind(node) == "sdpa" and arguments(node)["is_causal"] for node in nodes)
    pairs = TIME * keys_of(site) / (2 if halved else 1)
    return Cost(moved, products(site, pairs) + sum((_elements(site, node) for node in steps), sympy.S.Zero))


def streamed(site: Site) -> sympy.Expr:
    """Bytes of reading q, k and v once, heads not repeated, and writing the output once."""
    q_side = TIME * site.heads * (site.head_dim + site.value_dim)
    kv_side = keys_of(site) * site.kv_heads * (site.head_dim + site.value_dim)
    return BATCH * (q_side + kv_side) * item_size(site.out)


def products(site: Site, pairs: sympy.Expr) -> sympy.Expr:
    """Operations of q·k and of weighting v, for `pairs` of queries and keys in every head."""
    return 2 * BATCH * site.heads * pairs * (site.head_dim + site.value_dim)


def keys_of(site: Site) -> sympy.Symbol:
    """The number of keys: TIME when a sequence attends to itself."""
    return TIME if site.phase == "full" else KEYS


def item_size(node: Node) -> int:
    """Bytes of one element."""
    return (dtype_of(node) or torch.float32).itemsize


def _moves(node: Node) -> bool:
    if kind(node) in VIEWS:
        return False
    source, value = (value_of(n) for n in ((*node.all_input_nodes, node)[0], node))
    if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
        return False
    if kind(node) == "cast":
        return source.dtype != value.dtype
    return kind(node) != "contiguous" or source.stride() != value.stride()


def _reads(site: Site, node: Node) -> list[sympy.Expr]:
    if kind(node) != "sdpa":
        return [_bytes(site, source) for source in node.all_input_nodes]
    a = arguments(node)
    read = [_bytes(site, a[name]) for name in "qkv"]
    if a["mask"] is not None:
        read.append(BATCH * site.heads * TIME * keys_of(site) * item_size(a["mask"]))
    return read


def _bytes(site: Site, node: Node) -> sympy.Expr:
    return _elements(site, node) * item_size(node)


def _elements(site: Site, node: Node) -> sympy.Expr:
    """The number of elements of a tensor, its sizes named BATCH, TIME and KEYS where they are the site's; else 0."""
    shape = shape_of(node)
    if shape is None:
        return sympy.S.Zero
    named = ((_size(site, "k", 1), keys_of(site)), (_size(site, "q", 1), TIME), (_size(site, "q", 0), BATCH))
    symbols = {size.node.expr: name for size, name in named if isinstance(size, torch.SymInt)}
    return sympy.prod(
        symbols.get(size.node.expr, _number(size)) if isinstance(size, torch.SymInt) else size for size in shape
    )


def _size(site: Site, operand: str, place: int) -> Any:
    """The recorded size of canonical axis `place` of q or k: a number, or symbolic; 1 when the axis is absent."""
    found = site.q if operand == "q" else site.k
    shape = shape_of(found.node) or ()
    return math.prod(shape[axis] for axis in found.axes[place])


def _number(size: Any) -> int:
    """The value a size had in the example inputs."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return UNKNOWN_SIZE if hint is None else int(hint)
