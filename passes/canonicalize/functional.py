"""Make a graph functional: every write becomes a new value, and what was written to from outside is copied back at the end.

This is for graphs of torch functions and methods (Dynamo, symbolic_trace); torch's own functionalization does the same for
exported programs. Which nodes share memory is read off the fake values recorded at capture.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch._subclasses import FakeTensor
from torch.fx.node import map_arg

from subquad.ir.errors import CaptureError
from subquad.ir.graph import node_inputs, source_of, value_of
from subquad.passes.canonicalize.mutation import Unsupported, Write, write_of, writes_schema
from subquad.passes.canonicalize.views import Step, basic_steps, leading_ones_dropped, steps_of

Node = torch.fx.Node
aten = torch.ops.aten


def functional(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same computation with every write replaced by a value; the module itself when it writes nothing.

    module: a graph of torch functions with fake values on its nodes.  Placeholders and attributes that were written to are
    written again by one `copy_` each before the output, so that buffers and inputs change as they did.
    Raises CaptureError, naming the line, for a write that has no functional form.
    """
    _check_regions(module)
    try:
        if not any(_write(node) for node in module.graph.nodes):
            return module
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        copied = torch.fx.GraphModule(module, graph)
        _Functional(copied.graph).run(list(copied.graph.nodes))
    except Unsupported as error:
        raise CaptureError(f"{error}.") from error
    copied.graph.lint()
    copied.recompile()
    return copied


def _write(node: Node) -> Write | None:
    try:
        return write_of(node)
    except Unsupported as error:
        raise _located(error, node) from error


def _located(error: Unsupported, node: Node) -> Unsupported:
    return Unsupported(f"{error} ({source_of(node) or node.format_node()})")


def _check_regions(module: torch.fx.GraphModule) -> None:
    """Raises CaptureError for a write inside the region of a higher-order operator that was not inlined."""
    for name, region in module.named_modules():
        if not name or not isinstance(region, torch.fx.GraphModule):
            continue
        for node in region.graph.nodes:
            if writes_schema(node.target) or _writes(node):
                where = source_of(node) or node.format_node()
                raise CaptureError(f"a tensor is changed in place inside the region `{name}` ({where}).")


def _writes(node: Node) -> bool:
    try:
        return write_of(node) is not None
    except Unsupported:
        return True


class _Functional:
    """One walk over a graph that keeps, for every group of nodes that share memory, the node of its present content.

    root: the first node of a group.  parent: the node a view was made from.  version: how often a root was written.
    current: for a node the version it was made for, and the node that stands for it at that version.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph = graph
        self.attributes: dict[Any, Node] = {}
        self.pieces: dict[tuple[Any, Any], Node] = {}
        self.root: dict[Node, Node] = {}
        self.parent: dict[Node, Node] = {}
        self.whole: set[Node] = set()
        self.version: dict[Node, int] = {}
        self.current: dict[Node, tuple[int, Node]] = {}
        self.arguments: dict[Node, tuple[Any, Any]] = {}
        self.here: Node = next(iter(graph.nodes))
        values = (value_of(node) for node in graph.nodes)
        self.mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
        self.key = "val" if any("val" in node.meta for node in graph.nodes) else "example_value"

    def run(self, nodes: list[Node]) -> None:
        """Visit the nodes in order, then drop those that wrote."""
        writers = []
        for node in nodes:
            self.here = node
            self.arguments[node] = node.args, node.kwargs
            write = _write(node)
            if node.op == "output":
                self._copy_back()
            try:
                if write is None:
                    node.args, node.kwargs = self._read((node.args, node.kwargs))
                    self._join(node)
                    continue
                if write.target not in self.root:
                    raise Unsupported("a tensor of unknown origin is changed in place")
                self._alias(node, write.target)
                self._carry_out(node, write)
            except Unsupported as error:
                raise _located(error, node) from error
            writers.append(node)
        for node in reversed(writers):
            self.graph.erase_node(node)

    def _join(self, node: Node) -> None:
        """Put a node into the group of the argument that it shares memory with, or start a group."""
        keys = _storages(value_of(node))
        if not keys:
            return
        if node.op == "get_attr" and self.attributes.setdefault(node.target, node) is not node:
            self._alias(node, self.attributes[node.target])
            return
        args, kwargs = self.arguments[node]
        if self._is_fresh_result(node):
            first = self.pieces.setdefault((args[0], args[1]), node)
            if first is not node:
                self._alias(node, first)
                return
            args, kwargs = (), {}
        for given in node_inputs((list(args), dict(kwargs))):
            if keys & _storages(value_of(given)) and given in self.root:
                self.parent[node] = given
                root = self.root[node] = self.root[given]
                self.current[node] = self.version[root], node
                return
        self.root[node], self.version[node], self.current[node] = node, 0, (0, node)

    def _is_fresh_result(self, node: Node) -> bool:
        """True for one of several results of an operation that shares memory with none of its inputs, as topk's values."""
        source = self.arguments[node][0][0] if node.target is operator.getitem else None
        return (
            isinstance(source, Node) and isinstance(value_of(source), tuple | list) and self.root.get(source) is source
        )

    def _alias(self, node: Node, target: Node) -> None:
        """The node of a write returns the tensor it wrote."""
        self.parent[node], self.root[node] = target, self.root[target]
        self.current[node] = -1, node
        self.whole.add(node)

    def _read(self, value: Any) -> Any:
        return map_arg(value, self.present)

    def present(self, node: Node) -> Node:
        """The node that holds what `node` would hold now, after the writes so far."""
        root = self.root.get(node)
        if root is None:
            return node
        made, stands = self.current[node]
        if made != self.version[root]:
            parent = self.present(self.parent[node])
            if node in self.whole:
                stands = parent
            else:
                old, (args, kwargs) = self.parent[node], self.arguments[node]
                args, kwargs = map_arg((args, kwargs), lambda n: parent if n is old else self.present(n))
                stands = self._emit(node.op, node.target, args, kwargs, like=node)
            self.current[node] = self.version[root], stands
        return stands

    def _carry_out(self, node: Node, write: Write) -> None:
        target = write.target
        if write.call is not None:
            self._store(target, self._result(node, target, write.call))
            return
        steps, indices = basic_steps(write.index, value_of(target).dim())
        held = self.present(target)
        view = held
        for step in steps:
            view = step.forward(self._aten, view)
        value = self._assigned(view, indices, self._read(write.value))
        self._store(target, self._back(steps, held, value))

    def _assigned(self, view: Node, indices: list[Any], value: Any) -> Node:
        """The content of a view after an assignment to it, or to the entries that tensors index."""
        held, indices = value_of(view), self._read(indices)
        tensor = isinstance(value, Node) and isinstance(value_of(value), torch.Tensor)
        if not indices:
            if not tensor:
                return self._aten(aten.fill.Scalar, view, value)
            value = leading_ones_dropped(self._aten, value, held.dim())
            return self._aten(aten.copy.default, view, value)
        masks = [i for i in indices if i is not None and value_of(i).dtype == torch.bool]
        if len(indices) == 1 and masks and value_of(masks[0]).dim() == held.dim() and not tensor:
            return self._aten(aten.masked_fill.Scalar, view, masks[0], value)
        if not tensor:
            value = self._emit("call_function", torch.full, ((), value), {"dtype": held.dtype, "device": held.device})
        elif value_of(value).dtype != held.dtype:
            value = self._aten(aten.to.dtype, value, held.dtype)
        return self._aten(aten.index_put.default, view, indices, value)

    def _result(self, node: Node, target: Node, call: tuple[str, Any, tuple[Any, ...], dict[str, Any]]) -> Node:
        """The value of an operation that overwrites the target with its result."""
        op, function, args, kwargs = call
        if op == "clone":
            private = self._aten(aten.clone.default, self.present(target))
            args, kwargs = map_arg((args, kwargs), lambda n: private if n is target else self.present(n))
            return self._emit(node.op, node.target, args, kwargs)
        value = self._emit(op, function, self._read(args), self._read(kwargs))
        wanted, got = value_of(target), value_of(value)
        if not isinstance(got, torch.Tensor):
            raise Unsupported("an operation that returns no single tensor writes into one")
        if got.dtype != wanted.dtype:
            value = self._aten(aten.to.dtype, value, wanted.dtype)
        if got.dim() != wanted.dim():
            raise Unsupported("an operation writes a result of another shape into a tensor")
        return value

    def _store(self, target: Node, value: Node) -> None:
        """Make `value` the content of `target`, and carry it down to the root of its group."""
        root, node, content = self.root[target], target, value
        while node is not root:
            parent = self.parent[node]
            if node not in self.whole:
                if not isinstance(value_of(parent), torch.Tensor):
                    parent = self.parent[parent]
                content = self._back(steps_of(node), self.present(parent), content)
            node = parent
        self.version[root] += 1
        self.current[root] = self.version[root], content
        self.current[target] = self.version[root], value

    def _back(self, steps: list[Step], tensor: Node, content: Node) -> Node:
        """The tensor whose view by `steps` has the new content."""
        before = [tensor]
        for step in steps[:-1]:
            before.append(step.forward(self._aten, before[-1]))
        for step, held in zip(reversed(steps), reversed(before), strict=False):
            content = step.backward(self._aten, held, content)
        return content

    def _copy_back(self) -> None:
        """Write what the graph was given and changed back into it."""
        for root, version in list(self.version.items()):
            if version and root.op in ("placeholder", "get_attr"):
                written = self._aten(aten.copy_.default, root, self.present(root))
                self.version[root] += 1
                self.current[root] = self.version[root], written

    def _aten(self, target: Any, *args: Any) -> Node:
        return self._emit("call_function", target, args, {})

    def _emit(self, op: str, target: Any, args: Any, kwargs: Any, like: Node | None = None) -> Node:
        """A new node before the one being visited, with its fake value and the visited node's place in the code."""
        source = self.here if like is None else like
        with self.graph.inserting_before(self.here):
            node = self.graph.create_node(op, target, tuple(args), dict(kwargs))
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in source.meta:
                node.meta[key] = source.meta[key]
        node.meta[self.key] = self._value(node) if like is None else value_of(like)
        return node

    def _value(self, node: Node) -> Any:
        """The fake value of a new node."""
        if self.mode is None:
            raise Unsupported("a graph without recorded values changes a tensor in place")
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        with self.mode, torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "call_module":
                return args[0]
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _storages(value: Any) -> set[int]:
    """The memory that a value, or the tensors of a tuple, lie in."""
    if isinstance(value, torch.Tensor):
        if torch._C._functorch.is_batchedtensor(value):
            raise Unsupported("a tensor is changed in place in a graph that maps functions by torch.vmap")
        return {value.untyped_storage()._cdata}
    if isinstance(value, list | tuple):
        return set().union(*(_storages(item) for item in value))
    return set()
