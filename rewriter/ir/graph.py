"""Questions every pass asks of an fx node: shape, dtype, module path, source line, real users, ancestors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx

from subquad.ir.vocabulary import kind

Node = torch.fx.Node


def value_of(node: Node) -> Any:
    """The fake value recorded at capture: `val` from export, `example_value` from Dynamo; None when neither is there."""
    meta = node.meta
    if "val" in meta:
        return meta["val"]
    return meta.get("example_value")


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The (possibly symbolic) shape, or None for what is not a tensor."""
    value = value_of(node) if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype, or None for what is not a tensor."""
    value = value_of(node) if isinstance(node, Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def rank_of(node: Any) -> int | None:
    """The number of axes, or None for what is not a tensor."""
    shape = shape_of(node)
    return None if shape is None else len(shape)


def users_of(node: Node) -> list[Node]:
    """Users other than assertions, which export puts beside every cast."""
    return [user for user in node.users if kind(user) != "assertion"]


def module_path(node: Node) -> str:
    """The dotted path of the module whose forward made this node, "" for the root; call suffixes such as @1 are kept."""
    stack = node.meta.get("nn_module_stack") or {}
    for entry in reversed(list(stack.values())):
        path = str(entry[0])
        if path.startswith("_empty_nn_module_stack"):
            continue
        path = re.sub(r"^L\[['\"]\w+['\"]\]\.?|^L__self___?", "", path)
        path = re.sub(r"\.?__dict__\[['\"]_modules['\"]\]", "", path)
        path = re.sub(r"\._modules\[['\"]([^'\"]+)['\"]\]|_modules\[['\"]([^'\"]+)['\"]\]", r".\1\2", path)
        path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
        return path.strip(".")
    return ""


_LIBRARY = re.compile(r"[/\\](torch|transformers[/\\]utils)[/\\](?!.*modeling_)")


def source_of(node: Node) -> str:
    """`file:line` of the innermost frame of user code that made the node, "" when the capture kept none."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    for file, line in reversed(frames):
        if not _LIBRARY.search(file):
            return f"{file}:{line}"
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


def node_inputs(value: Any) -> Iterator[Node]:
    """Every node inside a nested argument."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from node_inputs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from node_inputs(item)
    elif isinstance(value, slice):
        yield from node_inputs((value.start, value.stop, value.step))


def ancestors(nodes: Iterable[Node]) -> list[Node]:
    """The nodes that `nodes` depend on, themselves included, in graph order."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    if not seen:
        return []
    graph = next(iter(seen)).graph
    if len(seen) * 8 < len(graph.nodes):
        return _sorted_by_position(seen)
    return [node for node in graph.nodes if node in seen]


def _sorted_by_position(nodes: set[Node]) -> list[Node]:
    return sorted(nodes)


def attribute(root: torch.nn.Module, target: str) -> Any:
    """The value a get_attr node reads: follows a dotted path through modules."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def hang(root: torch.nn.Module, name: str, value: Any, persistent: bool = True) -> None:
    """Set a parameter, buffer or module under a dotted name, in the place of a tensor there, making empty modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    for held in (root._parameters, root._buffers):
        held.pop(leaf, None)
    if isinstance(value, torch.nn.Module):
        root.add_module(leaf, value)
    elif isinstance(value, torch.nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value, persistent=persistent)
