"""Which axis of a value runs over the tokens: the facts of a locality proof, and the questions its rules ask of nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.errors import SubquadError
from subquad.ir.graph import module_path, source_of, value_of
from subquad.ir.refusal import Refusal

Node = torch.fx.Node


class NotIncremental(SubquadError):
    """A graph that cannot be run token by token; `refusal` names node, module path and source line."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal

    def __reduce__(self) -> tuple[Any, ...]:
        return NotIncremental, (self.refusal,)


@dataclass(frozen=True)
class TokenAxis:
    """Axis `axis` of a value has size outer · T · inner, tokens in row-major order between the two factors."""

    axis: int
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One


@dataclass
class Locality:
    """The proof.

    axes: the token axis of every tensor node that has one.  tokens: symbols that stand for the sequence length.
    inputs: placeholders with a token axis.  history: nodes that are running sums over the inputs' tokens.
    closed: nodes that depend on inputs and constants through integer or boolean values only.
    given: placeholders that do not grow with the tokens.  fixed: these, and what depends on them and on parameters alone.
    placed: nodes that depend on places and parameters alone.  pairs: those of them that are tables of tokens by tokens, or are
    computed from one.
    batch: symbols of the number of rows.  cross: attention sites whose keys and values are fixed.
    """

    axes: dict[Node, TokenAxis] = field(default_factory=dict)
    tokens: set[sympy.Symbol] = field(default_factory=set)
    inputs: list[Node] = field(default_factory=list)
    history: list[Node] = field(default_factory=list)
    closed: set[Node] = field(default_factory=set)
    placed: set[Node] = field(default_factory=set)
    pairs: set[Node] = field(default_factory=set)
    given: list[Node] = field(default_factory=list)
    fixed: set[Node] = field(default_factory=set)
    batch: set[sympy.Symbol] = field(default_factory=set)
    cross: list[Node] = field(default_factory=list)

    def depends_on_length(self, size: Any) -> bool:
        """True when a size or number varies with the sequence length."""
        return bool(expression_of(size).free_symbols & self.tokens)


def refuse(node: Node, reason: str) -> None:
    """Raise NotIncremental for this node."""
    raise NotIncremental(Refusal(module_path(node), f"decode: {name_of(node)}", reason, source_of(node)))


def operator_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator node by their schema names."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def tensors_of(proof: Locality, node: Node) -> list[tuple[torch.Tensor, TokenAxis | None]]:
    """The tensors a node gives, each with the node's token axis."""
    value = value_of(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    return [(v, proof.axes.get(node)) for v in values if isinstance(v, torch.Tensor)]


def is_uniform(proof: Locality, node: Node) -> bool:
    """True when no input has a token axis."""
    return not reads_tokens(proof, node)


def copy_axis(proof: Locality, node: Node, source: Any) -> None:
    """Give a node the token axis of another."""
    if source in proof.axes:
        proof.axes[node] = proof.axes[source]


def is_pointwise(node: Node) -> bool:
    """True for an operation that acts element by element."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def name_of(node: Node) -> str:
    """The operation's name without overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else node.name


def tensor_inputs(node: Node) -> list[Node]:
    """The inputs that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(value_of(n), (torch.Tensor, list, tuple))]


def reads_tokens(proof: Locality, node: Node) -> bool:
    """True when an input has a token axis."""
    return any(n in proof.axes for n in node.all_input_nodes)


def reads_length(proof: Locality, node: Node) -> bool:
    """True when an input is a number that varies with the sequence length."""
    return any(isinstance(v := value_of(n), torch.SymInt) and proof.depends_on_length(v) for n in node.all_input_nodes)


def is_floating(value: Any) -> bool:
    """True for a floating or complex tensor, and for several values."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (list, tuple))


def shape_of(node: Any) -> tuple[Any, ...]:
    """The recorded shape."""
    value = value_of(node)
    return tuple(value.shape)


def sizes_of(shape: tuple[Any, ...]) -> list[sympy.Expr]:
    """A shape as expressions."""
    return [expression_of(size) for size in shape]


def expression_of(size: Any) -> sympy.Expr:
    """A size or number as an expression."""
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else sympy.sympify(size)
