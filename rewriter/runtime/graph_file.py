"""Write fx graphs as JSON and read them back, with a list of allowed operations instead of code."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.fx

from subquad.ir.errors import ArtifactError
from subquad.runtime import few_tokens

Node = torch.fx.Node
NUMBERS = {
    f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
FORMS = {f"few_tokens.{name}": getattr(few_tokens, name) for name in few_tokens.FORMS}
ATEN = frozenset({
    "to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "dropout", "zeros_like", "ones_like", "full_like",
    "mean", "sum", "amax", "amin", "softmax", "log_softmax", "_softmax", "cumsum", "layer_norm", "rms_norm", "view",
    "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "mT", "full", "ones", "zeros",
    "new_ones", "new_zeros", "new_full", "scalar_tensor", "split", "split_with_sizes", "chunk", "unbind", "linear",
    "addmm", "matmul", "mm", "bmm", "unsqueeze", "squeeze", "slice", "arange", "expand", "cat", "select",
    "embedding", "index", "index_select", "index_copy_", "index_put_", "sym_size", "relu", "gelu", "silu", "softplus",
    "tanh", "sigmoid", "where", "argmax", "topk", "sort", "max", "min", "var", "logsumexp", "any", "all", "norm",
})  # fmt: skip
"""ATen operations beside the pointwise ones that a stored graph may hold; none touches files, memory or the process."""


def write_graph(graph: torch.fx.Graph) -> list[dict[str, Any]]:
    """The graph as plain data.  Raises ArtifactError when it holds an operation outside the list."""
    return [
        {
            "op": node.op,
            "name": node.name,
            "target": _write_target(node),
            "args": _write(node.args),
            "kwargs": {key: _write(value) for key, value in node.kwargs.items()},
            "meta": {key: True for key in ("stream",) if node.meta.get(key)},
        }
        for node in graph.nodes
    ]


def read_graph(data: Any) -> torch.fx.Graph:
    """The graph that `write_graph` wrote.  Raises ArtifactError for anything else; no code in the data is ever run."""
    graph = torch.fx.Graph()
    nodes: dict[str, Node] = {}
    try:
        for item in data:
            args = tuple(_read(value, nodes) for value in item["args"]["tuple"])
            kwargs = {str(key): _read(value, nodes) for key, value in item["kwargs"].items()}
            op = item["op"]
            if op == "output":
                graph.output(args[0])
                continue
            if op not in ("placeholder", "get_attr", "call_function"):
                raise ArtifactError(f"a stored graph holds the operation kind {op!r}, which is not allowed.")
            target = _read_target(item["target"]) if op == "call_function" else str(item["target"])
            node = graph.create_node(op, target, args, kwargs, name=str(item["name"]))
            node.meta.update({key: True for key in item["meta"] if key == "stream"})
            nodes[item["name"]] = node
        graph.lint()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"a stored graph is damaged ({type(error).__name__}: {error}); save the artifact again."
        ) from error
    return graph


def _write_target(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        name = f"{node.target.namespace}.{node.target._schema.name.partition('::')[2]}.{node.target._overloadname}"
        _read_target(name)
        return name
    for name, function in (NUMBERS | FORMS).items():
        if node.target is function:
            return name
    raise ArtifactError(f"the operation {node.target} cannot be stored with a decoder.")


def _read_target(name: str) -> Any:
    if name in NUMBERS or name in FORMS:
        return (NUMBERS | FORMS)[name]
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in ("aten", "subquad"):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        if packet is not None and parts[2] in packet.overloads():
            overload = getattr(packet, parts[2])
            if parts[0] == "subquad" or parts[1] in ATEN or torch.Tag.pointwise in overload.tags:
                return overload
    raise ArtifactError(f"a stored graph holds the operation {name!r}, which is not allowed.")


_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
}


def _write(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (tuple, torch.Size)):
        return {"tuple": [_write(v) for v in value]}
    if isinstance(value, list):
        return [_write(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [_write(value.start), _write(value.stop), _write(value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"format": str(value).removeprefix("torch.")}
    raise ArtifactError(f"a constant of type {type(value).__name__} cannot be stored with a decoder.")


def _read(value: Any, nodes: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_read(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "tuple":
        return tuple(_read(v, nodes) for v in inner)
    if kind == "slice":
        return slice(*(_read(v, nodes) for v in inner))
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "dtype" and isinstance(getattr(torch, inner), torch.dtype):
        return getattr(torch, inner)
    if kind == "device":
        return torch.device(inner)
    if kind == "layout":
        return _LAYOUTS[inner]
    if kind == "format":
        return _FORMATS[inner]
    raise ArtifactError(f"a stored graph holds a value of kind {kind!r}, which is not allowed.")
